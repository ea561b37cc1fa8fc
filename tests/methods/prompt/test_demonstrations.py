"""prompt.demonstrations: which examples stand before a text, by a model that goes by what it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from case import Case
from lfm.core import Inputs, Logprobs, Model
from lfm.core.errors import DataError
from lfm.core.interfaces import Classes, Score
from lfm.core.model import Facts
from lfm.data import files
from lfm.data.alike import by_words
from lfm.data.records import Label
from lfm.methods.prompt import demonstrations
from lfm.models import load
from lfm.prompting import racing
from lfm.runs.run import LocalRun

NOUNS = ("cat", "dog", "mat", "town", "world", "mountain")
TRAIN = [Label(text=f"The {n} sat.", label=label) for n, label in zip(NOUNS, ("good", "bad") * 3, strict=True)]
DEV = [Label(text=f"The {n} looked.", label=label) for n, label in zip(NOUNS, ("good", "bad") * 3, strict=True)]
SMALL: dict[str, Any] = {"k": 2, "candidates": 4, "examples": 6}


def case(here: Path) -> Case:
    tiny.causal(here / "model")
    files.write(TRAIN, here / "train.jsonl")
    files.write(DEV, here / "dev.jsonl")
    return Case(models={"model": ("model",)}, data={"train": "train.jsonl", "dev": "dev.jsonl"}, settings=SMALL)


class Copies:
    """Says the label of the example that shares most with the text; all alike where it is shown none."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        self.asked += prompts
        return [Score((said,), (self._one(prompt, said),)) for prompt, said in zip(prompts, continuations, strict=True)]

    def _one(self, prompt: str, said: str) -> float:
        *shown, text = prompt.split("\n")
        if not shown:
            return float(np.log(0.5))
        alike = by_words([line.rpartition(" ")[0] for line in shown])(text)
        label = shown[int(np.argmax(alike))].rpartition(" ")[2]
        return float(np.log(0.9 if label == said.strip() else 0.1))


def stand_in(answers: Any, context: int = 0) -> Model:
    facts = Facts(task="causal-lm", context=context)
    return Model("a script", "api", {Logprobs: lambda: answers}, lambda: "", look=lambda: facts)


def made(model: Model, here: Path, *, seed: int = 0, dev: Any = DEV, **settings: Any) -> tuple[Model, LocalRun]:
    here.mkdir(exist_ok=True, parents=True)
    config = demonstrations.Config(**{**SMALL, **settings})
    inputs = Inputs({"model": (model,)}, {"train": TRAIN, "dev": dev})
    demonstrations.agree(config, inputs)
    run = LocalRun(seed, here)
    return demonstrations.run(config, inputs, run), run


def right(model: Model, records: Sequence[Label]) -> float:
    told = model.ask(Classes)
    return float(
        np.mean([told.labels[i] == r.label for i, r in zip(told.tell(records).argmax(1), records, strict=True)])
    )


def test_the_nearest_are_those_that_a_copying_model_needs(tmp_path: Path) -> None:
    """Shown one example, the nearest answers all; one by chance answers its own class."""
    nearest, _ = made(stand_in(Copies()), tmp_path / "a", pick="nearest", k=1)
    chance, _ = made(stand_in(Copies()), tmp_path / "b", pick="random", k=1)
    assert right(nearest, DEV) == 1.0 and right(chance, DEV) == 0.5


def test_the_search_keeps_the_best_by_hand(tmp_path: Path) -> None:
    """All candidates on all records in one round: the kept one is the argmax, and nothing is asked twice."""
    answers = Copies()
    best, run = made(stand_in(answers), tmp_path, rounds=1, k=4, candidates=8)
    config = demonstrations.Config(**{**SMALL, "k": 4, "candidates": 8})
    scores = []
    for chosen in demonstrations.drawn(config, demonstrations.shots(_inputs(), 6, run.seed_for("examples"))[0], run):
        lines = [f"{r.text} {r.label}" for r in chosen]
        copied = [answers._one("\n".join([*lines, r.text]), r.label) for r in DEV]
        scores.append(np.mean([value > np.log(0.5) for value in copied]))
    assert right(best, DEV) == max(scores) == run.notes["accuracy_on_dev"]
    searched = answers.asked[: racing.asked(9, 6, 1) * 2]
    assert len(set(searched)) * 2 == len(searched)  # each prompt with each of two words, once


def _inputs() -> Inputs:
    return Inputs({}, {"train": TRAIN, "dev": DEV})


def test_queries_are_those_the_plan_names(tmp_path: Path) -> None:
    answers = Copies()
    made(stand_in(answers), tmp_path)
    assert len(answers.asked) == 2 * racing.asked(5, 6, 3)


@pytest.mark.parametrize("by", ["logp", "entropy"])
def test_scores_are_their_definitions(by: Any) -> None:
    told = np.log(np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]))
    expected = {
        "logp": np.log([0.9, 0.4, 0.8, 0.7]).mean(),
        "entropy": -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)),  # three told the first, one the second
    }
    assert racing.score(told, [0, 1, 1, 0], by) == pytest.approx((expected[by], 0.75))


def test_what_leaves_no_room_is_left_out_or_refused(tmp_path: Path) -> None:
    model = load(tiny.causal(tmp_path / "model"))  # 128 tokens
    _, run = made(model, tmp_path / "a", k=6)
    assert run.notes["too_long"] == 0
    long = [Label(text="The cat sat on the mat. " * 20, label="good"), Label(text="No.", label="bad")]
    with pytest.raises(DataError, match="leaves room"):
        made(model, tmp_path / "b", dev=long)
    with pytest.raises(DataError, match=r"left to choose.*dev=FILE"):
        made(model, tmp_path / "c", dev=())
