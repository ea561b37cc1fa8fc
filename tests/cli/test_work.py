"""The commands that plan, run, measure and look back, on a real, tiny model."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from rich.padding import Padding

from lfm import cli, record, runs
from lfm.cli import progress, screen
from lfm.cli.work import DOES_NOT_FIT
from lfm.runs import plan as plan_function
from lfm.runs.machine import Machine
from lfm.search import outcome
from lfm.search.outcome import Ended, Result

pytestmark = pytest.mark.usefixtures("workshop")

SHIFT = ["run", "edit.shift", "model=model", "--set", "size=0.25", "--out", "shifted"]
TEXTS = '{"kind": "text", "text": "the cat sat on the mat"}\n{"kind": "text", "text": "the dog looked at the cat"}\n'


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """What a command prints on stdout, after it ended with this code."""
    got = cli.run(words)
    captured = capsys.readouterr()
    assert got == code, captured.err
    return captured.out


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    """The JSON that a command prints; nothing else may stand on stdout."""
    return json.loads(said(capsys, *words, "--json", code=code))


def test_a_run_says_what_came_out_and_how_it_was_verified(capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts.jsonl").write_text(TEXTS)
    shown = said(capsys, *SHIFT, "--eval", "texts.jsonl")
    assert "edit.shift" in shown and "perplexity" in shown and "verified: max |Δlogit| = 0" in shown
    done = record.read(Path("shifted"))
    assert done.config["size"] == 0.25
    assert done.command == "lfm run edit.shift model=model --set size=0.25 --eval=texts.jsonl --out shifted"
    page = Path("shifted/report.html").read_text()
    assert "edit.shift" in page and "shifted" in page and "artefact" not in page


def test_the_recorded_command_does_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    said(capsys, *SHIFT, "--seed", "3")
    command = shlex.split(record.read(Path("shifted")).command)
    said(capsys, *command[1:-1], "again")
    assert record.read(Path("again")).output.digest == record.read(Path("shifted")).output.digest
    assert record.read(Path("again")).seed == 3


def test_json_is_all_that_stands_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    done = told(capsys, *SHIFT)
    assert done["id"] == "edit.shift" and done["out"] == "shifted" and done["verified"]["max_abs"] == 0
    assert told(capsys, "verify", "shifted")["max_abs"] == 0
    same = told(capsys, "compare", "model", "model")
    assert same["same"]
    changed = told(capsys, "compare", "model", "shifted")
    assert not changed["same"] and len(changed["changed"]) == 1
    assert changed["changed"][0]["max_abs"] == pytest.approx(0.25)
    ancestry = told(capsys, "lineage", "shifted")
    assert [node["method"] for node in ancestry] == ["edit.shift", ""]
    Path("texts.jsonl").write_text(TEXTS)
    scored = told(capsys, "eval", "model", "--data", "texts.jsonl")
    assert scored["texts.jsonl"]["metrics"]["perplexity"]["value"] > 0
    plan = told(capsys, "plan", "edit.shift", "model=model")
    assert plan["fits"] and plan["access"] == {"model": ["weights"]} and not Path("runs").exists()


def test_a_finding_is_shown_as_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "run", "probe.norm", "model=model", "--out", "norms")
    assert "Norms" in shown and "tensor" in shown and "verified" in shown


def test_a_plan_that_does_not_fit_says_so_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Machine(device="cpu", cores=1, flops=1e9, memory=10**6, disk=10)
    monkeypatch.setattr(sys.modules["lfm.runs.plan"], "machine", lambda out: small)
    assert callable(plan_function)
    shown = said(capsys, "plan", "edit.shift", "model=model", code=DOES_NOT_FIT)
    assert "would not fit" in shown and "memory: needs" in shown and "disk: needs" in shown


def test_lineage_is_a_tree_and_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, *SHIFT)
    said(capsys, "run", "edit.shift", "model=shifted", "--out", "twice")
    shown = said(capsys, "lineage", "twice")
    assert shown.index("twice") < shown.index("shifted") < shown.index("model")
    said(capsys, "lineage", "twice", "--svg", "lineage.svg")
    text = "".join(ElementTree.parse("lineage.svg").getroot().itertext())
    assert "twice" in text and "shifted" in text and "edit.shift" in text
    said(capsys, "lineage", "twice", "--html", "lineage.html")
    assert "<svg" in Path("lineage.html").read_text()


def test_the_ledger_is_rebuilt_from_the_runs(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, *SHIFT)
    from lfm.runs import ledger

    (ledger.home() / "ledger.jsonl").unlink()
    assert cli.run(["lineage", "--rebuild", "."]) == 0
    assert "1 run below" in capsys.readouterr().err
    assert ledger.find(record.read(Path("shifted")).output.digest) == str(Path("shifted").resolve())


def test_undo_gives_the_base_back(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "run", "edit.shift", "model=model", "--out", "shifted")
    if not record.read(Path("shifted")).undo:
        assert "cannot be undone" in _error(capsys, "undo", "shifted", "--out", "back", code=2)
        return
    assert "to the byte" in said(capsys, "undo", "shifted", "--out", "back")
    assert Path("back/model.safetensors").read_bytes() == Path("model/model.safetensors").read_bytes()


def test_a_report_of_several_runs_is_one_page(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, *SHIFT)
    said(capsys, "run", "edit.shift", "model=shifted", "--out", "twice")
    assert said(capsys, "report", "shifted", "twice", "--out", "both.html").strip() == "both.html"
    assert Path("both.html").read_text().count('class="chapter"') == 2


def test_verify_finds_a_changed_byte(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, *SHIFT)
    with Path("shifted/model.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x01")
    assert "is not what its run made" in _error(capsys, "verify", "shifted", code=5)


def test_an_interrupted_run_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "execute", interrupted)
    shown = _error(capsys, *SHIFT, code=cli.INTERRUPTED)
    assert "stopped" in shown and "lfm run edit.shift model=model --set size=0.25 --out shifted" in shown


def _error(capsys: pytest.CaptureFixture[str], *words: str, code: int) -> str:
    assert cli.run(words) == code
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return " ".join(captured.err.split())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "edit.shift"], "add model=REF"),
        (["run", "edit.shift", "modle=model"], "did you mean 'model'"),
        (["run", "edit.shift", "model"], "write ROLE=REF"),
        (["run", "edit.shift", "model=nowhere"], "there is no model 'nowhere'"),
        (["run", "edit.shift", "model=model", "--set", "sise=1"], "did you mean 'size'"),
        (["run", "edit.shift", "model=model", "--set", "size=big"], "the default is 0.5"),
        (["run", "edit.shift", "model=model", "--set", "size"], "--set KEY=VALUE"),
        (["run", "edit.shift", "model=model", "--set", "size=[1,"], "not JSON"),
        (["run", "edit.shift", "model=model", "--out", "model"], "model exists"),
        (["run", "edit.shfit", "model=model"], "did you mean edit.shift"),
        (["run", "no-such.yaml"], "no recipe 'no-such.yaml'"),
        (["run", "merge", "model=model"], "is a recipe"),
        (["plan", "edit.shift", "model=nowhere"], "there is no model 'nowhere'"),
        (["verify", "model"], "not a run directory"),
        (["report", "model"], "not a run directory"),
        (["lineage", "model"], "was not made by a run"),
        (["lineage"], "give a run's directory"),
        (["eval", "model", "--data", "nowhere.jsonl"], "no data file"),
        (["compare", "model", "nowhere"], "there is no model 'nowhere'"),
        (["chat", "nowhere", "hello"], "there is no model 'nowhere'"),
    ],
)
def test_a_mistake_is_one_error_and_leaves_nothing(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in _error(capsys, *words, code=2)
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["model"]


def test_chat_says_something_to_a_prompt_and_line_by_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    once = said(capsys, "chat", "model", "the cat", "--max-tokens", "4")
    assert once.strip()
    lines = iter(["the cat", "the dog", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert said(capsys, "chat", "model", "--max-tokens", "4").startswith(once)


def test_doctor_names_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    lines = {line["name"]: line for line in told(capsys, "doctor")}
    assert (
        lines["torch"]["state"] == "ok" and "free" in lines["memory"]["value"] and "cores" in lines["device"]["value"]
    )
    assert "torch" in said(capsys, "doctor")


RECIPE = """\
name: two steps
steps:
  - {id: a, method: edit.shift, models: {model: model}}
  - {id: b, method: edit.shift, models: {model: "${a}"}, set: {size: 2}}
"""


def test_a_recipe_is_planned_run_reported_and_verified(capsys: pytest.CaptureFixture[str]) -> None:
    Path("two.yaml").write_text(RECIPE)
    plan = told(capsys, "plan", "two.yaml")
    assert list(plan["steps"]) == ["a", "b"] and plan["disk"] > 0 and not Path("runs").exists()
    assert "it fits" in said(capsys, "plan", "two.yaml")
    shown = said(capsys, "run", "two.yaml", "--set", "b.size=3")
    assert "2 steps made" in shown
    page = Path(shown.strip().splitlines()[-1])
    assert page == Path("runs/two/report.html").resolve() and "two steps" in page.read_text()
    assert record.read(Path("runs/two/b")).config["size"] == 3
    again = told(capsys, "run", "two.yaml", "--set", "b.size=3")
    assert {part["status"] for part in again["parts"]} == {"kept"}
    assert len(told(capsys, "verify", "runs/two")) == 2


def test_a_recipes_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(said(capsys, "recipe-schema"))["title"] == "Learn From Model recipe"


def test_serve_says_where_and_stops_when_told(workshop: Path) -> None:
    command = [sys.executable, "-m", "lfm", "serve", str(workshop / "model"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        url = None
        while url is None and (line := server.stderr.readline()):
            found = re.search(r"http://[\d.]+:\d+/v1", line)
            url = found[0] if found else None
        assert url, "it ended without saying where it serves"
        assert httpx.get(f"{url}/models", timeout=30).json()["data"]
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) in (0, 130)


def test_what_is_left_of_work_that_goes_on_is_reckoned_by_what_was_done_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 steps 10 were there before; 5 took 60 s, so 5 more take another 60, not 20."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    steps = progress.Steps()
    steps.show("fit", 10, 20)
    clock[0] = 60.0
    steps.show("fit", 15, 20)
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(steps)
    assert f"{screen.duration(60)}, {screen.duration(60)} left" in console.export_text()


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_table_keeps_names_and_numbers_whole_and_tells_reasons_to_their_end(width: int) -> None:
    """A sweep's, its longest method's name among them: at 80 letters the reasons stand below."""
    why = "unexpected RuntimeError, layer.py:12: mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"
    tries = [
        Ended(
            "tune.adapters_continual", {"lr": 2.5e-4, "rank": 16}, 1.0, Result(0.9, 0.3, [1.0] * 4, 123456, 12.4, "")
        ),
        Ended("tune.lora", {"lr": 2.5e-4}, 1.0, Result(0.9, 0.2, [1.0] * 4, 65536, 22.4, "")),
        Ended("tune.svf", {}, 1 / 9, Result(0.0, 0.0, [], 0, 0.0, why)),
    ]
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(Padding(screen.finding(outcome.told(tries, outcome.ranked(tries)), width=width), (1, 0, 0, 2)))
    shown = console.export_text()
    for whole in ("tune.adapters_continual", "123 456", "0.00025", "22.4", "seconds"):
        assert whole in shown
    assert "".join(why.split()) in "".join(shown.split())
    assert ("\n  why not" in shown) == (width == 80)
