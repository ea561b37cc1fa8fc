"""prompt.rlprompt: its reward by hand, its policy towards what is rewarded, and the paper's gain on a small model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import tiny
from case import Case
from lfm import runs
from lfm.core import Inputs, Logprobs, Model
from lfm.core.errors import AccessError, ConfigError
from lfm.core.interfaces import Classes, Score
from lfm.core.model import Facts
from lfm.data import files
from lfm.data.records import Fact, Label
from lfm.methods.prompt import rlprompt
from lfm.models import load
from lfm.runs.run import LocalRun

TRAIN = [Label(text=f"The {n} sat.", label=("good", "bad")[i % 2]) for i, n in enumerate(("cat", "dog", "mat", "town"))]
SMALL: dict[str, Any] = {"steps": 4, "prompts": 4, "hidden": 16, "dev_every": 2}


def case(here: Path) -> Case:
    tiny.causal(here / "model")
    files.write(TRAIN, here / "train.jsonl")
    return Case(models={"model": ("model",)}, data={"train": "train.jsonl"}, settings=SMALL)


@pytest.fixture(scope="module")
def cat(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(tiny.causal(tmp_path_factory.mktemp("cat") / "cat"))


class Letters:
    """The surer of the right class, the more letters "e" stand after the text."""

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        return [Score((c,), (self._one(p, c.strip()),)) for p, c in zip(prompts, continuations, strict=True)]

    def _one(self, prompt: str, said: str) -> float:
        record = next(r for r in TRAIN if prompt.startswith(r.text))
        sure = 1 / (1 + np.exp(-0.5 * (prompt[len(record.text) :].count("e") - 2)))
        return float(np.log(sure if said == record.label else 1 - sure))


def made(
    model: Model, here: Path, *, policy: Model | None = None, seed: int = 0, **settings: Any
) -> tuple[Model, LocalRun]:
    here.mkdir(exist_ok=True, parents=True)
    config = rlprompt.Config(**{**SMALL, **settings})
    inputs = Inputs({"model": (model,)} | ({"policy": (policy,)} if policy else {}), {"train": TRAIN})
    rlprompt.agree(config, inputs)
    run = LocalRun(seed, here)
    return rlprompt.run(config, inputs, run), run


def scripted(answers: Any) -> Model:
    return Model("a script", "api", {Logprobs: lambda: answers}, lambda: "", look=lambda: Facts(task="causal-lm"))


def test_margins_by_hand() -> None:
    """λ₂ = 200 of a right margin, λ₁ = 180 of a wrong one; then in standard deviations, times five."""
    shares = np.array([[[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]]])
    assert rlprompt.margins(shares, [0, 2], rlprompt.Config())[0] == pytest.approx([200 * 0.3, 180 * -0.2])
    assert rlprompt.shaped([1.0, 3.0]) == pytest.approx([-5.0, 5.0], rel=1e-3)


def test_the_policy_learns_what_is_rewarded(cat: Model, tmp_path: Path) -> None:
    """Another model is the policy, the prompted one tells scores alone: prompts get more "e"s, and one is kept."""
    found, run = made(
        scripted(Letters()), tmp_path, policy=cat, steps=100, prompts=16, lr=3e-2, hidden=64, dev_every=20
    )
    curve = run.curves["train reward"]
    assert np.mean(curve[-20:]) > np.mean(curve[:20]) + 10
    assert run.notes["reward_after"] > run.notes["reward_before"]  # type: ignore[operator]
    told = found.ask(Classes).tell(TRAIN)
    labels = found.ask(Classes).labels
    mean = rlprompt.margins(np.exp(told)[None], [labels.index(r.label) for r in TRAIN], rlprompt.Config()).mean()
    assert mean == pytest.approx(run.notes["reward_after"])


def test_who_cannot_write_and_where_it_would_not_stand(cat: Model, tmp_path: Path) -> None:
    with pytest.raises(AccessError, match=r"cannot be the policy.*policy=REF"):
        made(scripted(Letters()), tmp_path)
    with pytest.raises(ConfigError, match="no place for the prompt"):
        made(cat, tmp_path, template="{text} {mask}")


@pytest.mark.slow
def test_two_tokens_bring_out_what_a_small_model_knows(tmp_path: Path) -> None:
    """Where people live, of four cities, asked by their names alone: zoo:lm prompts itself, over three seeds."""
    cities = ("Denver", "Hanoi", "Rome", "Vienna")
    facts = [f for f in cast("list[Fact]", runs.records("zoo:facts")) if f.relation == "city" and f.object in cities]
    records = [Label(text=f.subject, label=f.object) for f in facts]
    train, others = records[:6], records[6:]
    model = runs.model("zoo:lm")
    config = rlprompt.Config(steps=60, length=2, examples=16, lr=1e-2, hidden=256)
    for seed in range(3):
        here = tmp_path / str(seed)
        here.mkdir()
        run = LocalRun(seed, here)
        told = rlprompt.run(config, Inputs({"model": (model,)}, {"train": train}), run).ask(Classes)
        right = np.mean([told.labels[i] == r.label for i, r in zip(told.tell(others).argmax(1), others, strict=True)])
        print(run.notes, f"right of {len(others)} others: {right}")
        assert float(run.notes["reward_before"]) < 0 < float(run.notes["reward_after"]) and right > 0.5
