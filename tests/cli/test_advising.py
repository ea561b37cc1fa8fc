"""`lfm advise`: the same run as `lfm run prompt.advise`, said shorter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from lfm.cli import run
from lfm.data.files import write
from lfm.data.records import Label


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.causal(tmp_path / "model")
    words = {"cat": "good", "dog": "bad"}
    write([Label(text=f"The {w} sat {n}.", label=label) for n in range(4) for w, label in words.items()], "train.jsonl")


GIVEN = ["advise", "model=model", "train=train.jsonl", "-m", "prompt.manual", "--queries", "150"]


def test_advice_by_words_is_the_run_that_its_record_names(files: None, capsys: pytest.CaptureFixture[str]) -> None:
    words = '{"good": ["cat"], "bad": ["mat"]}'
    assert run([*GIVEN, "--set", f"words={words}", "--set", "patience=2", "--out", "best", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["id"] == "prompt.advise" and told["queries"] <= 150
    assert told["config"]["settings"] == {"words": json.loads(words)} and told["config"]["patience"] == 2
    assert told["command"].startswith("lfm run prompt.advise model=model train=train.jsonl")
    assert told["notes"]["advice"].startswith("Best for 150 queries: prompt.manual")


def test_a_plan_asks_nothing_and_what_is_wrong_is_said(files: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*GIVEN, "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] and not Path("runs").exists()
    assert run([*GIVEN, "--set", "epoch=1"]) == 2
    assert "no method that is tried has epoch" in capsys.readouterr().err
    assert run(["advise", "model=model", "train=train.jsonl", "-q", "1"]) != 0
    assert "allow 4 queries or more" in capsys.readouterr().err
    assert not Path("runs").exists() or not any(Path("runs").iterdir())
