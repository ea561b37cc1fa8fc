"""prompt.instruction: a proposer that can write finds what a model obeys; edits find their way without one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from case import Case
from lfm.core import Inputs, Logprobs, Model, Text
from lfm.core.errors import AccessError
from lfm.core.finding import read
from lfm.core.interfaces import Classes, Ranked, Score
from lfm.core.model import Facts
from lfm.data import files
from lfm.data.records import Label
from lfm.methods.prompt import instruction
from lfm.prompting import proposing, racing
from lfm.runs.run import LocalRun

TRAIN = [Label(text=f"The {n} is here.", label=("good", "bad")[i % 2]) for i, n in enumerate("abcdefgh")]
SMALL: dict[str, Any] = {"propose": "edits", "generations": 2, "population": 3, "examples": 4}


def case(here: Path) -> Case:
    tiny.causal(here / "model")
    files.write(TRAIN, here / "train.jsonl")
    return Case(models={"model": ("model",)}, data={"train": "train.jsonl"}, settings=SMALL)


class Obeys:
    """The more of the words it likes stand in the instruction, the surer it tells the right label."""

    def __init__(self, likes: Sequence[str]) -> None:
        self.likes, self.asked = likes, list[tuple[str, str]]()

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        self.asked += zip(prompts, continuations, strict=True)
        return [Score((s,), (self._one(p, s.strip()),)) for p, s in zip(prompts, continuations, strict=True)]

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Ranked]:
        return [[(f" {word}", -float(i)) for i, word in enumerate(LIKES)] for _ in prompts]

    def _one(self, prompt: str, said: str) -> float:
        before, _, text = prompt.rpartition("\n")
        share = np.mean([word in before.split() for word in self.likes])
        truth = next(record.label for record in TRAIN if record.text == text)
        return float(np.log((0.05 + 0.9 * share) if said == truth else 0.5))


class Writes:
    """Writes an instruction with one more liked word than the best it is shown, as a good proposer would."""

    def __init__(self, likes: Sequence[str]) -> None:
        self.likes, self.read = likes, list[str]()

    def generate(self, prompts: Sequence[str], **_: Any) -> list[str]:
        self.read += prompts
        return [f' "{self._one(prompt)}"\nBecause it is better.' for prompt in prompts]

    def _one(self, prompt: str) -> str:
        tried = [line.partition(": ")[2] for line in prompt.splitlines() if line.startswith("Instruction: ")]
        most = max((sum(word in text.split() for word in self.likes) for text in tried), default=0)
        return "Please " + " ".join(self.likes[: most + 1])


LIKES = ("judge", "the", "letter", "well")


def stand_in(**kinds: Any) -> Model:
    given = {{"text": Text, "logprobs": Logprobs}[name]: (lambda one=one: one) for name, one in kinds.items()}
    return Model("a script", "api", given, lambda: "", look=lambda: Facts(task="causal-lm"))


def made(model: Model, here: Path, *, proposer: Model | None = None, **settings: Any) -> tuple[Model, LocalRun]:
    here.mkdir(exist_ok=True, parents=True)
    config = instruction.Config(**{**SMALL, **settings})
    models = {"model": (model,)} | ({"proposer": (proposer,)} if proposer else {})
    inputs = Inputs(models, {"train": TRAIN})
    instruction.agree(config, inputs)
    run = LocalRun(0, here)
    return instruction.run(config, inputs, run), run


def test_a_proposer_that_writes_finds_what_the_model_obeys(tmp_path: Path) -> None:
    """Four liked words, one more a generation: after four the instruction has them all; the table tells the way."""
    obeys, writes = Obeys(LIKES), Writes(LIKES)
    found, run = made(
        stand_in(logprobs=obeys), tmp_path, proposer=stand_in(text=writes), propose="model", generations=4, by="logp"
    )
    assert run.notes["instruction"] == "Please judge the letter well"
    told = found.ask(Classes)
    assert [told.labels[i] for i in told.tell(TRAIN).argmax(1)] == [r.label for r in TRAIN]
    assert run.curves["train score"] == sorted(run.curves["train score"])
    assert read(tmp_path / "scratch").rows[0]["instruction"] == run.notes["instruction"]
    later = next(prompt for prompt in writes.read if "Score:" in prompt)
    scores = [int(line.split()[1]) for line in later.splitlines() if line.startswith("Score:")]
    assert scores == sorted(scores)  # from worst to best


def test_nothing_is_asked_twice_and_no_more_than_planned(tmp_path: Path) -> None:
    obeys = Obeys(("good",))
    made(stand_in(logprobs=obeys), tmp_path, generations=3)
    assert len(set(obeys.asked)) == len(obeys.asked)
    pairs = 2 * 4 + 3 * racing.asked(3 + 4, 4, 3) + (4 + 2) * 4
    assert len(obeys.asked) <= 2 * pairs


def test_edits_alone_climb(tmp_path: Path) -> None:
    """Words that the model would say come in one by one; where no edit helps, what is kept is no worse than none."""
    start = ("Say the word good or bad.",)
    likes = stand_in(logprobs=Obeys(LIKES))
    _, run = made(likes, tmp_path, start=start, generations=6, population=8, by="logp")
    curve = run.curves["train score"]
    assert curve == sorted(curve) and curve[-1] > curve[0]
    _, none = made(stand_in(logprobs=Obeys(("never",))), tmp_path / "b", start=start)
    assert none.notes["accuracy"] == 0.0 and len(none.curves["train score"]) == 2


def test_each_edit_keeps_the_words_but_those_it_takes() -> None:
    bank: list[str] = []
    draw = random.Random(0)
    text = "one two three four five"
    for _ in range(200):
        held = len(bank)
        new = proposing.edited(text, bank, None, draw)
        gone = bank[held] if len(bank) > held else ""
        more = len(new.split()) - 5
        assert sorted([*new.split(), *gone.split()]) == sorted(text.split()) or more > 0
        if more > 0:
            assert any(sorted([*text.split(), *phrase.split()]) == sorted(new.split()) for phrase in bank)


@pytest.mark.parametrize(
    ("said", "expected"),
    [(' "Judge it."\nYes', "Judge it."), ("\n\n Instruction: Go.", "Go."), ("Use {text}", ""), (" ...\n", "")],
)
def test_what_a_proposer_says_is_cleaned(said: str, expected: str) -> None:
    assert proposing.cleaned(said) == expected


def test_who_cannot_write_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match=r"cannot write.*proposer=REF.*propose=edits"):
        made(stand_in(logprobs=Obeys(())), tmp_path, propose="model")
