"""prompt.self_consistency: the majority of a noisy model is right as often as the binomial says."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import tiny
from case import Case
from lfm import runs
from lfm.core import Inputs, Model, Text
from lfm.core.errors import ConfigError
from lfm.core.interfaces import Classes
from lfm.data.records import Completion, Fact, Label
from lfm.evals import evaluate
from lfm.methods.prompt import self_consistency
from lfm.runs.run import LocalRun

SMALL: dict[str, Any] = {"samples": 5, "max_tokens": 4}


def case(here: Path) -> Case:
    tiny.causal(here / "model")
    return Case(models={"model": ("model",)}, settings=SMALL)


class Noisy:
    """Reasons, and says "yes" with a probability, else "no"."""

    def __init__(self, right: float) -> None:
        self.right, self.asked = right, 0

    def generate(self, prompts: Sequence[str], *, seed: int = 0, temperature: float = 0.0, **_: Any) -> list[str]:
        assert temperature > 0
        self.asked += len(prompts)
        draws = np.random.default_rng(seed).random(len(prompts)) < self.right
        return [f"Let me think. no, or yes?\nAnswer: {'Yes.' if hit else 'no'}" for hit in draws]


def made(answers: Any, here: Path, **settings: Any) -> Model:
    config = self_consistency.Config(**{**SMALL, **settings})
    model = Model("a script", "api", {Text: lambda: answers}, lambda: "")
    inputs = Inputs({"model": (model,)}, {})
    self_consistency.agree(config, inputs)
    return self_consistency.run(config, inputs, LocalRun(0, here))


@pytest.mark.parametrize("n", [1, 5, 15])
def test_accuracy_rises_as_the_binomial_says(n: int, tmp_path: Path) -> None:
    """Σ_{k > n/2} C(n, k) p^k (1 − p)^(n−k) at p = 0.65, within 4 standard errors; n queries each."""
    noisy, p, asked = Noisy(0.65), 0.65, 2000
    told = made(noisy, tmp_path, samples=n, answer=r"Answer: (\w+)").ask(Text).generate(["Is it?"] * asked)
    expected = sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n // 2 + 1, n + 1))
    assert np.mean([said == " Yes" for said in told]) == pytest.approx(
        expected, abs=4 * (expected * (1 - expected) / asked) ** 0.5
    )
    assert noisy.asked == n * asked


def test_classes_are_shares_of_the_votes(tmp_path: Path) -> None:
    noisy = Noisy(0.8)
    model = made(noisy, tmp_path, samples=9, words={"agree": ("yes",), "deny": ("no",)}, answer=r"Answer: (\w+)")
    told = model.ask(Classes)
    yes = sum("Yes" in said for said in noisy.generate([""] * 9, seed=0, temperature=1.0))
    assert told.labels == ("agree", "deny")
    assert np.exp(told.tell([Label(text="Is it?", label="")])[0]) == pytest.approx([(yes + 1) / 11, (10 - yes) / 11])


def test_it_is_evaluated_as_text(tmp_path: Path) -> None:
    model = made(Noisy(1.0), tmp_path, answer=r"Answer: (\w+)")
    assert evaluate(model, [Completion(prompt="Is it?", completion=" Yes")] * 3).metrics["exact_match"].value == 1.0


@pytest.mark.parametrize(
    ("said", "pattern", "expected"),
    [
        ("So:\n 42.\n\n", "", "42."),
        ("Answer: 4\nno\nAnswer: 5", r"Answer: (\d)", "5"),
        ("it is 7", r"\d", "7"),
        ("none", r"\d", ""),
        ("...\n", "", ""),
    ],
)
def test_final_answers(said: str, pattern: str, expected: str) -> None:
    assert self_consistency.final_answer(said, pattern) == expected


def test_votes_are_counted_as_answers_and_the_first_of_equals_wins() -> None:
    assert self_consistency.elected(["Rome", "paris.", "Paris", "", "rome!", "oslo", "PARIS"]) == "paris."
    assert self_consistency.elected(["b", "a", "A.", "B"]) == "b"
    assert self_consistency.elected(["", "?"]) == ""
    assert self_consistency.named("Very good indeed", [("bad",), ("very", "very good")]) == 1
    assert self_consistency.named("goodness", [("good",)]) is None


def test_a_bad_pattern_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no regular expression"):
        made(Noisy(1.0), tmp_path, answer="(")


@pytest.mark.slow
def test_votes_bring_back_what_a_small_model_knows() -> None:
    """60 facts that zoo:lm tells greedily, sampled at a temperature that garbles half of them, over three seeds."""
    facts = cast("list[Fact]", list(runs.records("zoo:facts"))[::8])
    config = self_consistency.Config(samples=15, temperature=2.0, max_tokens=4, answer=r"^\s*([\w ]+)", stop=(".",))
    votes = self_consistency.Votes(runs.model("zoo:lm"), config)
    for seed in range(3):
        answers = votes.samples([fact.prompt for fact in facts], seed)
        right = [
            np.mean([self_consistency.elected(a[:n]) == f.object for a, f in zip(answers, facts, strict=True)])
            for n in (1, 5, 15)
        ]
        print(seed, right)
        assert right == sorted(right) and right[-1] > right[0] + 0.3
