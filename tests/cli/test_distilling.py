"""`lfm distill cache`: the same run as `lfm run distill.cache`, said shorter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from lfm.cli import run
from lfm.data.files import write
from lfm.data.records import Label

GIVEN = ["distill", "cache", "teacher=big", "train=train.jsonl", "-k", "3"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.classifier(tmp_path / "big")
    write([Label(text=f"the {w}", label=w) for w in tiny.LABELS], tmp_path / "train.jsonl")


def test_answers_are_kept_by_the_run_that_the_record_names(files: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*GIVEN, "--out", "answers", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["id"] == "distill.cache" and told["config"]["k"] == 3 and told["notes"]["asked"] == 3
    assert told["command"].startswith("lfm run distill.cache teacher=big train=train.jsonl")
    assert run(["distill", "cache", "teacher=big", "train=train.jsonl", "kept=answers", "-k", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"]["asked"] == 0


def test_a_plan_runs_nothing(files: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*GIVEN, "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    assert not Path("runs").exists()
