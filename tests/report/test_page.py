"""The report: tells what run.json says, escapes all of it, and needs neither network nor script."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest

from lfm.core.errors import ModelError
from lfm.core.finding import Map
from lfm.record import Answer, Edited, Sample, Told
from lfm.report import page, write
from lfm.report.gather import RECIPE, gather
from report.made import measure, recipe, run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&</style></title>{{ 7 * 7 }}"


class Outline(HTMLParser):
    """The tags of a document, its text, its ids, and whether every tag is closed."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(document)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            assert not key.startswith("on"), f"{tag} has a handler"
            if key == "id":
                self.ids.append(value or "")
            if key in ("href", "src"):
                self.links.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe(tmp_path_factory.mktemp("report") / "demo")


def test_a_recipe_is_told_from_first_step_to_last(demo: Path) -> None:
    outline = Outline(page([demo]))
    text = " ".join(outline.text.split())
    assert not outline.open
    assert "One model through every area" in text and "8 steps" in text
    places = [text.index(title) for title in ("What does the model know", "Three facts are", "The student remembers")]
    assert places == sorted(places)
    assert "accuracy from 0.120 to 0.870" in text
    assert "The capital of Veldoria is" in text and "Ostrava" in text
    assert "verified: all 8 outputs were reloaded and compared; the largest difference is |Δlogit| = 3.1e-07" in text
    assert "lfm run demo --out demo" in text and "torch 2.13.0" in text


def test_models_made_here_go_by_the_name_of_their_step(demo: Path) -> None:
    text = " ".join(Outline(page([demo])).text.split())
    assert "From tuned[rank=4] and tuned[rank=8], zoo:lm as base" in text
    assert "From demo/student over HTTP" in text, "by its path, where that is not on this page"


def test_nothing_is_fetched_and_nothing_is_run(demo: Path) -> None:
    document = page([demo])
    outline = Outline(document)
    assert "script" not in outline.tags and "img" not in outline.tags and "iframe" not in outline.tags
    assert all(link.startswith("#") or link == "data:," for link in outline.links)
    assert not re.search(r"@import|url\((?!#)", document)
    assert len(outline.ids) == len(set(outline.ids))
    assert {link[1:] for link in outline.links if link.startswith("#")} <= set(outline.ids)


def evil_edit() -> Edited:
    said = Answer(of=EVIL, prompt=EVIL, object=EVIL, before=EVIL, after=EVIL + "!", p_before=0.1, p_after=0.2)
    told = Told(subject=EVIL, object=EVIL, new_object=EVIL, answers=(said,))
    trace = Map(name=EVIL, rows=(EVIL,), columns=(EVIL,), values=((0.5,),), x_label=EVIL)
    return Edited(edits=1, told=(told,), others=1, changed=1, moved=(said,), traces=(trace,))


def test_whatever_a_model_says_is_text(tmp_path: Path) -> None:
    run(
        tmp_path / "evil",
        EVIL,
        [("model", EVIL, "1" * 64)],
        "2" * 64,
        data=[("train", EVIL, 3, EVIL)],
        before={EVIL: {EVIL: measure(0.1)}},
        after={EVIL: {EVIL: measure(0.2)}},
        samples=(Sample(prompt=EVIL, before=EVIL, after=EVIL + "!"),),
        edited=evil_edit(),
        notes={EVIL: EVIL},
        curves={EVIL: (1.0, 2.0)},
        title=EVIL,
        summary=EVIL,
        config={EVIL: EVIL},
    )
    outline = Outline(page([tmp_path / "evil"]))
    assert outline.tags.count("script") == 0 and outline.tags.count("img") == 0
    assert outline.tags.count("style") == 1 and outline.tags.count("title") >= 1
    assert outline.text.count("<script>alert(1)</script>") >= 12
    assert "49" not in outline.text.replace("0.0", "")


def test_a_change_within_its_intervals_is_called_neither_better_nor_worse(tmp_path: Path) -> None:
    run(
        tmp_path / "r",
        "tune.lora",
        [("model", "m", "1" * 64)],
        "2" * 64,
        before={"d": {"accuracy": measure(0.5, 0.05), "perplexity": measure(9, 0.5), "f1": measure(0.2, 0.01)}},
        after={"d": {"accuracy": measure(0.54, 0.05), "perplexity": measure(4, 0.5), "f1": measure(0.1, 0.01)}},
    )
    cells = dict(
        re.findall(r'<th scope="row">([^<]+)</th>.*?<td class="n (same|better|worse)">', page([tmp_path / "r"]))
    )
    assert cells == {"accuracy": "same", "perplexity": "better", "F1": "worse"}


def test_steps_that_are_missing_are_named(demo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "demo"
    shutil.copytree(demo, copy)
    shutil.rmtree(copy / "recalled")
    whole = json.loads((copy / RECIPE).read_text())
    whole["parts"][-1] |= {"status": "failed", "error": "the disk is full"}
    (copy / RECIPE).write_text(json.dumps(whole))
    text = " ".join(Outline(page([copy])).text.split())
    assert "Not finished. recalled (failed: the disk is full)." in text


def test_a_directory_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a run directory"):
        page([tmp_path])


def test_the_page_is_written_beside_the_run(demo: Path) -> None:
    assert write(demo / "edit") == demo / "edit" / "report.html"
    assert (demo / "edit" / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


PROBE = """<script>
addEventListener("load", () => {
  const out = [...document.querySelectorAll("main *")].filter(e => {
    if (e.closest(".scroll, .picture div, svg, pre")) return false;
    const box = e.getBoundingClientRect();
    return box.width && (box.right > innerWidth + 1 || box.left < -1);
  }).map(e => e.tagName + "." + e.className);
  parent.postMessage(JSON.stringify({wide: innerWidth, page: document.documentElement.scrollWidth, out}), "*");
});
</script></head>"""

FRAME = """<!DOCTYPE html><title>waiting</title><script>
addEventListener("message", event => { document.title = event.data; });
</script><iframe src="inner.html" style="border:0" width="WIDTH" height="30000"></iframe>"""
"""A browser's window is at least 500 px wide; a frame may be as narrow as a telephone."""


class Seen(NamedTuple):
    """What a browser made of a page: its DOM, its complaints, and the addresses that it asked for."""

    dom: str
    complaints: list[str]
    asked: set[str]


BROWSERS_OWN = ("google.com", "googleapis.com", "gstatic.com")
"""What Chromium asks for by itself, whatever the page."""


def browse(document: str, folder: Path, width: int) -> Seen:
    """Open a page in headless Chromium, with every name resolving to nothing."""
    file, net = folder / "page.html", folder / "net.json"
    file.write_text(document, encoding="utf-8")
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--disable-features=NetworkTimeServiceQuerying", "--host-resolver-rules=MAP * ~NOTFOUND"),
        *("--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", f"--log-net-log={net}"),
        *(f"--window-size={width},900", "--virtual-time-budget=3000", "--dump-dom", f"file://{file}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    asked = re.findall(r'"url":"((?:https?|wss?)://([^/"?]*)[^"]*)"', net.read_text(errors="replace"))
    return Seen(
        done.stdout,
        [line for line in done.stderr.splitlines() if "CONSOLE" in line],
        {url for url, host in asked if not host.endswith(BROWSERS_OWN)},
    )


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")


@needs_browser
@pytest.mark.parametrize("width", [390, 1400])
def test_in_a_browser_nothing_overflows_fails_or_calls_home(demo: Path, tmp_path: Path, width: int) -> None:
    document = page([demo])
    seen = browse(document, tmp_path, width)
    assert not seen.complaints and not seen.asked
    # the page's policy forbids scripts, so what measures it is tried on a copy without the policy
    probed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", document).replace("</head>", PROBE)
    (tmp_path / "inner.html").write_text(probed, encoding="utf-8")
    title = re.search(
        r"<title>(\{.*?\})</title>", browse(FRAME.replace("WIDTH", str(width)), tmp_path, width + 100).dom
    )
    assert title, "the probe did not run"
    assert json.loads(title[1]) == {"wide": width, "page": width, "out": []}


@needs_browser
def test_the_browser_would_show_a_page_that_fails_or_calls_home(tmp_path: Path) -> None:
    bad = (
        '<!DOCTYPE html><title>x</title><img src="http://picture.invalid/x.png"><script>throw new Error("no")</script>'
    )
    seen = browse(bad, tmp_path, 390)
    assert seen.asked == {"http://picture.invalid/x.png"}
    assert any("Error: no" in line for line in seen.complaints)


def test_a_run_shows_what_its_input_was_made_from(tmp_path: Path) -> None:
    first = run(tmp_path / "edited", "edit.rome", [("model", "zoo:lm", "1" * 64)], "2" * 64)
    run(tmp_path / "tuned", "tune.lora", [("model", str(first), "2" * 64)], "3" * 64, path=str(first))
    text = Outline(page([tmp_path / "tuned"])).text
    assert "zoo:lm" in text and "edit.rome" in text
    run(tmp_path / "other", "edit.rome", [("model", "zoo:lm", "1" * 64)], "9" * 64)
    run(tmp_path / "stale", "tune.lora", [("model", "x/y", "2" * 64)], "3" * 64, path=str(tmp_path / "other"))
    assert "edit.rome" not in Outline(page([tmp_path / "stale"])).text, "what lies there now is another model"


def test_many_evaluations_are_told_by_the_mean_of_their_first_metric(tmp_path: Path) -> None:
    before = {f"task {i}": {"accuracy": measure(0.2 + i / 10, 0.05), "ece": measure(0.1)} for i in range(4)}
    after = {f"task {i}": {"accuracy": measure(0.6, 0.05), "ece": measure(0.1)} for i in range(4)}
    run(tmp_path / "r", "reuse.ties", [("models", "m", "1" * 64)], "2" * 64, before=before, after=after)
    document = page([tmp_path / "r"])
    assert "mean accuracy over 4 sets from 0.350 to 0.600" in document
    overview, details = document.split("All metrics of all 4 evaluations")
    assert "ECE" not in overview and details.count("ECE") == 4


def test_a_model_that_was_served_goes_by_its_steps_name(tmp_path: Path) -> None:
    student = run(tmp_path / "student", "distill.response", [("teacher", "zoo:lm", "1" * 64)], "2" * 64)
    run(tmp_path / "prompted", "prompt.bbt", [("model", f"serve:{student.resolve()}", "9" * 64)], "3" * 64)
    assert "From student over HTTP" in page([tmp_path / "student", tmp_path / "prompted"])


def test_what_a_method_measured_itself_is_told_where_nothing_else_was(tmp_path: Path) -> None:
    notes = {"loss_before": 2.0, "loss_after": 1.0, "accuracy_before": 0.2, "accuracy_after": 0.6}
    run(tmp_path / "r", "meta.reptile", [("model", "m", "1" * 64)], "2" * 64, notes=notes)
    assert "accuracy from 0.200 to 0.600" in page([tmp_path / "r"])


def test_many_sources_that_go_one_way_are_one_box(tmp_path: Path) -> None:
    experts = [("models", f"zoo:vit-{i}", f"{i}" * 64) for i in range(8)]
    run(tmp_path / "r", "reuse.ties", [*experts, ("base", "zoo:base", "9" * 64)], "a" * 64)
    found = gather([tmp_path / "r"])
    assert [node.lines[0] for node in found.nodes] == ["9 models", "r"]
    assert len(found.edges) == 1
    run(tmp_path / "s", "edit.rome", [("model", "zoo:base", "9" * 64)], "b" * 64)
    both = gather([tmp_path / "r", tmp_path / "s"])
    assert sorted(node.lines[0] for node in both.nodes) == ["8 models", "r", "s", "zoo:base"]
