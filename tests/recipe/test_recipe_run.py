"""Recipes run: each step once, in order, kept while unchanged, side by side in processes, resumed after a kill."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import lfm
from lfm import recipe as recipes
from lfm import record
from lfm.core import Weights
from lfm.core.errors import LfmError, OutputError, RecipeError
from lfm.recipe import place
from lfm.recipe.run import run
from lfm.report.gather import RECIPE, Whole

CHAIN = """\
name: a chain
params: {size: 0.25}
steps:
  - id: measured
    method: probe.norm
    models: {model: model}
  - id: shifted
    method: edit.shift
    models: {model: model}
    set: {size: "${params.size}"}
  - id: again
    method: edit.shift
    about: shifted once more from ${shifted.notes.size}, where the norm was ${measured.metrics.norm}
    models: {model: "${shifted}"}
    matrix: {size: [1, 2]}
  - id: after
    method: probe.norm
    models: {model: "${again[size=2]}"}
"""


def go(text: str, out: Path = Path("out"), overrides: Mapping[str, Any] | None = None, **how: Any) -> dict[str, str]:
    recipe = recipes.parse(text, "r.yaml")
    whole: Whole = run(recipe, recipes.expand(recipe, overrides), out, **how)
    return {part.name: part.status for part in whole.parts}


def first_weight(ref: Path) -> float:
    tensors = lfm.load(ref).ask(Weights).tensors()
    return float(next(t for t in tensors.values() if t.dtype.is_floating_point).read().flatten()[0])


def test_every_step_is_a_run_and_references_are_followed(workshop: Path) -> None:
    assert set(go(CHAIN).values()) == {"done"}
    assert first_weight(Path("out/again/size=2")) == pytest.approx(first_weight(Path("model")) + 2.25)
    again = record.read(Path("out/again/size=1"))
    assert again.inputs[0].digest == record.read(Path("out/shifted")).output.digest
    norm = record.read(Path("out/measured")).notes["norm"]
    assert again.title == f"shifted once more from 0.25, where the norm was {norm}"
    assert Path("out/after/finding.json").exists() and Path("out/again/size=1/report.html").exists()
    told = json.loads(Path("out", RECIPE).read_text())
    assert [part["name"] for part in told["parts"]] == [
        "measured",
        "shifted",
        "again[size=1]",
        "again[size=2]",
        "after",
    ]


def test_unchanged_steps_are_kept_and_a_change_remakes_what_follows(workshop: Path) -> None:
    go(CHAIN)
    made = Path("out/measured/run.json").stat().st_mtime_ns
    assert set(go(CHAIN).values()) == {"kept"}
    assert Path("out/measured/run.json").stat().st_mtime_ns == made
    changed = go(CHAIN, overrides={"params.size": 0.75})
    assert changed == {
        "measured": "kept", "shifted": "done", "again[size=1]": "done", "again[size=2]": "done", "after": "done",
    }  # fmt: skip
    assert set(go(CHAIN).values()) == {"kept"}, "what was replaced comes back"
    assert record.read(Path("out/shifted")).config["size"] == 0.25


def test_a_changed_input_is_a_change(workshop: Path) -> None:
    go(CHAIN)
    lfm.run("edit.shift", {"model": "model"}, out="other")
    shutil.rmtree("model")
    shutil.move("other", "model")
    assert set(go(CHAIN).values()) == {"done"}


def test_independent_steps_run_in_processes_of_their_own_at_the_same_time(workshop: Path) -> None:
    text = """\
name: two at once
steps:
  - {id: a, method: edit.shift, models: {model: model}, set: {meet: "a-is-here,b-is-here"}}
  - {id: b, method: edit.shift, models: {model: model}, set: {meet: "b-is-here,a-is-here", size: 2}}
  - {id: c, method: edit.shift, models: {model: "${a}"}}
"""
    seen: list[tuple[str, str]] = []
    statuses = go(text, workers=2, show=lambda job, label, done, total: seen.append((job, label)))
    assert set(statuses.values()) == {"done"}, "each waits for the other to have begun"
    assert len({record.read(Path("out", name)).notes["process"] for name in "ab"}) == 2
    assert ("a", "verifying") in seen, "progress comes from the workers"
    assert set(go(text, Path("serial")).values()) == {"done"}
    for name in "abc":
        assert record.read(Path("out", name)).output.digest == record.read(Path("serial", name)).output.digest


def test_a_step_whose_process_dies_is_named_and_resumes(workshop: Path) -> None:
    text = """\
name: death
steps:
  - {id: a, method: edit.shift, models: {model: model}, set: {die: here}}
  - {id: b, method: edit.shift, models: {model: "${a}"}}
"""
    with pytest.raises(LfmError, match=r"r\.yaml:3: the process of step 'a' was killed"):
        go(text, workers=2)
    told = json.loads(Path("out", RECIPE).read_text())
    assert [part["status"] for part in told["parts"]] == ["failed", "waiting"]
    assert set(go(text).values()) == {"done"}
    notes = record.read(Path("out/a")).notes
    assert notes["began_in"] != notes["process"], "the step that the first process kept was not made again"


def test_workers_end_with_the_recipe_that_was_killed_and_its_steps_are_free(workshop: Path) -> None:
    text = """\
name: orphans
steps:
  - {id: a, method: edit.shift, models: {model: model}, set: {meet: "begun,free"}}
  - {id: b, method: probe.norm, models: {model: model}}
"""
    Path("r.yaml").write_text(text)
    path = {"PYTHONPATH": str(workshop.parent / "site")}
    asked = [sys.executable, "-m", "lfm", "run", "r.yaml", "--out", "out", "-j", "2"]
    recipe = subprocess.Popen(asked, env=os.environ | path, stderr=subprocess.DEVNULL)
    while not Path("begun").exists():
        assert recipe.poll() is None
        time.sleep(0.05)
    recipe.kill()
    recipe.wait()
    with Path("out/.a.lfm/lock").open("w") as lock:
        for _ in range(600):  # without end, if the worker lived on: what it waits for is not there
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        else:
            pytest.fail("the worker holds its step, though its recipe is gone")
    Path("free").touch()
    assert set(go(text).values()) <= {"done", "kept"}


def test_an_interrupted_step_whose_settings_change_gives_way_and_comes_back(workshop: Path) -> None:
    text = """\
name: change of mind
steps:
  - {id: a, method: edit.shift, models: {model: model}, set: {stop: here}}
"""
    with pytest.raises(KeyboardInterrupt):
        go(text)
    assert set(go(text, overrides={"a.size": 2}).values()) == {"done"}
    assert record.read(Path("out/a")).config["size"] == 2
    Path("here").touch()
    assert set(go(text).values()) == {"done"}
    assert record.read(Path("out/a")).notes["found"] == 1.0, "the first step was still there"


def test_an_error_names_step_file_and_line_and_keeps_what_was_done(workshop: Path) -> None:
    broken = CHAIN.replace('models: {model: "${shifted}"}', "models: {model: nowhere}")
    with pytest.raises(LfmError, match=r"r\.yaml:11: step 'again\[size=1\]': there is no model 'nowhere'"):
        go(broken)
    told = {part["name"]: part for part in json.loads(Path("out", RECIPE).read_text())["parts"]}
    assert told["shifted"]["status"] == "done" and told["again[size=1]"]["status"] == "failed"
    assert "nowhere" in told["again[size=1]"]["error"]
    assert go(CHAIN) == {
        "measured": "kept", "shifted": "kept", "again[size=1]": "done", "again[size=2]": "done", "after": "done",
    }  # fmt: skip


def test_a_value_that_no_step_measured_is_named_with_those_that_it_did(workshop: Path) -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml:11: .*measured\.metrics\.nrm.*notes\.norm"):
        go(CHAIN.replace("measured.metrics.norm", "measured.metrics.nrm"))


def test_a_directory_that_is_no_recipes_output_is_refused(workshop: Path) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not a recipe's output"):
        go(CHAIN)
    assert [f.name for f in Path("out").iterdir()] == ["thesis.txt"]


def test_of_two_processes_with_one_output_one_wins(workshop: Path) -> None:
    with place.claim(Path("out")), pytest.raises(OutputError, match="another process"):
        go(CHAIN)


def test_references_to_files_are_looked_for_beside_the_recipe_first(workshop: Path, monkeypatch: Any) -> None:
    Path("r.yaml").write_text(CHAIN)
    monkeypatch.chdir("/")
    recipe = recipes.read(workshop / "r.yaml")
    whole = run(recipe, recipes.expand(recipe), workshop / "out")
    assert {part.status for part in whole.parts} == {"done"}
