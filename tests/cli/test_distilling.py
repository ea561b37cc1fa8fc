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


def test_an_endpoint_teaches_a_student_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    run(["methods", "--have", "text,logprobs", "--data", "unlabeled", "--json"])
    found = {entry["id"]: entry for entry in json.loads(capsys.readouterr().out)}
    student = {"student": ["codec", "gradients"]}
    for name in ("text", "samples", "response"):
        assert found[f"distill.{name}"]["works"] and found[f"distill.{name}"]["beside"] == student
    generative = found["distill.generative"]  # of which the teacher's gradients are wanted too
    assert not generative["works"] and generative["missing"] == ["gradients"] and not generative["beside"]


def test_what_was_kept_of_a_teacher_stands_for_it_beside_a_student(capsys: pytest.CaptureFixture[str]) -> None:
    """Each model in hand gives answers, and no student can be trained on that: so it came to no method at all."""
    assert run(["methods", "--have", "answers", "--json"]) == 0
    beside = {entry["id"]: entry["beside"] for entry in json.loads(capsys.readouterr().out) if entry["works"]}
    student = {"student": ["codec", "gradients"]}
    asked = {"teacher": ["logits or logprobs or top or classes"]}
    assert beside == {"distill.cache": asked, "distill.multi_teacher": student, "distill.response": student}
    assert run(["methods", "--have", "answers", "--data", "none"]) == 0
    shown = capsys.readouterr().out
    assert "distill.response" in shown and "distill.noise" not in shown, "it would need all that it needs anyway"


def test_answers_given_for_a_model_are_refused_in_words(files: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*GIVEN, "--out", "answers"]) == 0
    assert run(["run", "tune.lora", "model=answers", "train=train.jsonl", "--out", "out"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "this cache of a teacher's answers gives answers" in told
    assert "methods that work with it: distill.cache, distill.multi_teacher, distill.response" in told
    assert run(["distill", "cache", "teacher=answers", "train=train.jsonl"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "distill.cache asks logits or logprobs or top or classes of 'teacher', which" in told
    assert "methods that work with it: distill.multi_teacher, distill.response" in told, "it does not: this is it"
    assert run(["eval", "answers", "--data", "train.jsonl"]) == 2
    assert "and this cache of a teacher's answers gives answers" in " ".join(capsys.readouterr().err.split())
