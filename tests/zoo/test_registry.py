"""The zoo's registry: found by path, made once, keyed by what makes it, whole or not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lfm import zoo
from lfm.core.errors import ModelError, OutputError
from lfm.data import files
from lfm.data.records import Text

FERN = """
from lfm.data.records import Text
from lfm.zoo.exhibit import Exhibit, records

def make(out, making):
    with (making.work.parent.parent / "log").open("a") as log:
        log.write("fern ")
    for _ in making.track(range(3), "the fern grows"):
        pass
    (out / "config.json").write_text("{}")

MODELS = (Exhibit("fern", "a fern", make, takes="3 s"),)
DATA = (records("leaves", "what it drops", lambda: [Text(text="green"), Text(text="brown")]),)
"""
MOSS = """
from lfm.zoo import soil
from lfm.zoo.exhibit import Exhibit

def make(out, making):
    (out / "config.json").write_text(soil.KIND + (making.parts["fern"] / "config.json").read_text())

MODELS = (Exhibit("moss", "grows on ferns", make, needs=("fern",)),)
"""
SOIL = "KIND = 'peat'"

Plant = Callable[..., None]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    """Adds modules to the zoo, by name and source; the zoo's home is the test's own."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(zoo, "__path__", [*zoo.__path__, str(folder)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a source changed within a second must be read again

    def forget() -> None:
        for cached in (zoo._files, zoo._exhibits, zoo._key, zoo._sources):
            cached.cache_clear()
        for file in folder.glob("*.py"):
            sys.modules.pop(f"lfm.zoo.{file.stem}", None)
            if hasattr(zoo, file.stem):
                delattr(zoo, file.stem)

    def planted(**sources: str) -> None:
        for name, source in sources.items():
            (folder / f"{name}.py").write_text(source)
        forget()

    yield planted
    forget()


def log(tmp_path: Path) -> list[str]:
    return (tmp_path / "home" / "zoo" / "log").read_text().split()


def test_a_file_beside_the_others_is_all_it_takes(plant: Plant) -> None:
    assert "fern" not in {entry.name for entry in zoo.listing()}
    plant(fern=FERN)
    found = {entry.name: entry for entry in zoo.listing()}
    assert (found["fern"].kind, found["fern"].summary, found["fern"].takes) == ("model", "a fern", "3 s")
    assert found["leaves"].kind == "data"
    assert not found["fern"].made


def test_it_is_made_on_first_use_and_once(plant: Plant, tmp_path: Path) -> None:
    plant(fern=FERN)
    shown: list[tuple[str, int, int | None]] = []
    place = zoo.model("fern", lambda *step: shown.append(step))
    assert shown == [("the fern grows", done, 3) for done in range(4)]
    assert [file.name for file in place.iterdir()] == ["config.json"]
    assert zoo.make("fern") == zoo.model("fern") == place
    assert log(tmp_path) == ["fern"]
    found = {entry.name: entry for entry in zoo.listing()}["fern"]
    assert found.made and found.path == str(place)
    assert not [file for file in place.parent.iterdir() if file.name.endswith(".making")]


def test_data_is_a_file_of_records(plant: Plant) -> None:
    plant(fern=FERN)
    place = zoo.data("leaves")
    assert place.name == "leaves.jsonl"
    assert files.read(place) == (Text(text="green"), Text(text="brown"))
    assert {entry.name: entry for entry in zoo.listing()}["leaves"].path == str(place)


def test_what_it_needs_is_made_first(plant: Plant, tmp_path: Path) -> None:
    plant(fern=FERN, moss=MOSS, soil=SOIL)
    assert (zoo.model("moss") / "config.json").read_text() == "peat{}"
    assert log(tmp_path) == ["fern"]


def test_it_is_made_anew_when_what_makes_it_has_changed_and_only_then(plant: Plant) -> None:
    plant(fern=FERN, moss=MOSS, soil=SOIL)

    def places() -> dict[str, str]:
        return {entry.name: entry.path for entry in zoo.listing()}

    first = places()
    plant(soil="KIND = 'sand'")  # which the moss imports
    second = places()
    assert {name for name in first if first[name] != second[name]} == {"moss"}
    plant(fern=FERN + "\n")  # which the moss needs
    third = places()
    assert {name for name in first if second[name] != third[name]} == {"fern", "leaves", "moss"}
    plant(fern=FERN)
    assert places() == second


@pytest.mark.parametrize(
    ("ask", "what", "fix"),
    [
        (lambda: zoo.model("fren"), "the zoo has no model 'fren'", "zoo:fern"),
        (lambda: zoo.data("leafs"), "the zoo has no data 'leafs'", "zoo:leaves"),
        (lambda: zoo.make("qqqq"), "no model or data 'qqqq'", "lfm zoo"),
        (lambda: zoo.model("leaves"), "zoo:leaves is data", ""),
        (lambda: zoo.data("fern"), "zoo:fern is a model", ""),
    ],
)
def test_an_unknown_name_is_told_with_its_neighbours(
    plant: Plant, ask: Callable[[], Path], what: str, fix: str
) -> None:
    plant(fern=FERN)
    with pytest.raises(ModelError) as caught:
        ask()
    assert what in str(caught.value) and fix in caught.value.fix


def test_what_fails_leaves_nothing_but_what_spares_work(plant: Plant) -> None:
    plant(
        fern=FERN.replace(
            '(out / "config.json").write_text("{}")',
            """(out / "config.json").write_text("half")
    kept = making.work / "checkpoint"
    if not kept.exists():
        kept.write_text("step 7")
        raise RuntimeError("struck by lightning")
    assert [f.name for f in out.iterdir()] == ["config.json"]
    (out / "config.json").write_text(kept.read_text())""",
        )
    )
    with pytest.raises(RuntimeError, match="lightning"):
        zoo.model("fern")
    assert not {entry.name: entry for entry in zoo.listing()}["fern"].made
    assert (zoo.model("fern") / "config.json").read_text() == "step 7"


def test_a_home_that_cannot_be_written_is_told(plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(fern=FERN)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="LFM_HOME"):
        zoo.model("fern")


def test_of_two_processes_one_makes_it_and_the_other_waits(plant: Plant, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    source = FERN.replace("    for _ in", f"    open({str(gate)!r}).read()\n    for _ in")
    plant(fern=source)
    code = (
        "from lfm import zoo\n"
        f"zoo.__path__.append({str(tmp_path / 'modules')!r})\n"
        "print(zoo.model('fern', lambda label, done, total: print(label, flush=True)))"
    )

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    with start() as first, gate.open("w") as opened, start() as second:  # the gate opens once the first is at it
        assert second.stdout is not None and first.stdout is not None
        assert second.stdout.readline() == "another process is making fern\n"
        opened.close()
        waited, worked = second.stdout.read().split("\n"), first.stdout.read().split("\n")
    assert first.returncode == second.returncode == 0
    assert waited == [worked[-2], ""], "it shows nothing of making, and ends at the same path"
    assert log(tmp_path) == ["fern"]


def test_listing_loads_nothing_heavy() -> None:
    code = "import sys; from lfm import zoo; assert zoo.listing(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "transformers", "sklearn", "PIL"} & set(loaded)


PAGE = (Path(__file__).parents[2] / "docs" / "zoo.md").read_text(encoding="utf-8")


def test_the_page_names_every_exhibit() -> None:
    for entry in zoo.listing():
        name = entry.name.removesuffix("-test").removeprefix("vit-")
        assert f"`{name}`" in PAGE or f"`vit-{name}`" in PAGE, entry.name


def test_the_page_shows_how_to_add_one(plant: Plant) -> None:
    (example,) = re.findall(r"```python\n(from lfm.data.records.*?)```", PAGE, re.DOTALL)
    plant(tones=example)
    kinds = {entry.name: entry.kind for entry in zoo.listing()}
    assert (kinds["tone"], kinds["tones"]) == ("model", "data")
    assert files.read(zoo.data("tones")) == (Text(text="do"), Text(text="re"))
