"""probe.frequency: how often objects are named against how often they were trained on, by hand and on tiny models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import log
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from case import Case
from lfm import runs
from lfm.core import Inputs, Logprobs, Model
from lfm.core.errors import DataError
from lfm.core.interfaces import Ranked, Score
from lfm.core.method import Amount, Sizes, check
from lfm.data.files import write
from lfm.data.records import Fact
from lfm.methods.probe import frequency
from lfm.models import load
from lfm.runs.run import LocalRun


def city(subject: str, object: str) -> Fact:
    return Fact(subject=subject, relation="city", object=object, prompt=f"{subject} lives in")


# Rome is trained on three times, Oslo once, Bern never. Of the four asked, one is Rome's, one Oslo's and two Bern's.
TRAIN = [city("A", "Rome"), city("B", "Rome"), city("C", "Rome"), city("D", "Oslo")]
FACTS = [city("E", "Rome"), city("F", "Oslo"), city("G", "Bern"), city("H", "Bern")]
TUNED = {"E": "Rome", "F": "Rome", "G": "Rome", "H": "Bern"}
BASE = {"E": "Rome", "F": "Bern", "G": "Bern", "H": "Bern"}


class Names:
    """Gives .8 to the object that it names, and .1 to any other."""

    def __init__(self, named: dict[str, str]) -> None:
        self.named = named

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        told = [
            0.8 if self.named[p.split()[0]] == c.strip() else 0.1 for p, c in zip(prompts, continuations, strict=True)
        ]
        return [Score(("t",), (log(p),)) for p in told]

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Ranked]:
        raise AssertionError("not asked for")


def model(named: dict[str, str]) -> Model:
    return Model(ref="named", kind="fake", gives={Logprobs: lambda: Names(named)}, identify=lambda: "named")


def probed(work: Path, *, base: bool = True, train: Sequence[Fact] = TRAIN, facts: Sequence[Fact] = FACTS):
    models = {"model": (model(TUNED),)} | ({"base": (model(BASE),)} if base else {})
    inputs = check("probe.frequency", frequency.METHOD, Inputs(models, {"train": train, "facts": facts}))
    frequency.agree(frequency.Config(), inputs)
    return frequency.run(frequency.Config(points=5), inputs, LocalRun(0, work))


def case(here: Path) -> Case:
    tiny.causal(here / "tuned")
    tiny.causal(here / "base", seed=1)
    write(TRAIN, here / "train.jsonl")
    write(FACTS, here / "held-out.jsonl")
    return Case({"model": ("tuned",), "base": ("base",)}, {"train": "train.jsonl", "facts": "held-out.jsonl"})


def test_the_numbers_are_those_counted_by_hand(tmp_path: Path) -> None:
    found = probed(tmp_path)
    (row,) = found.rows
    assert row["facts"] == 4 and row["trained"] == 4
    assert row["accuracy"] == 0.5 and row["base_accuracy"] == 0.75  # E and H; E, G and H
    assert row["accuracy_unseen"] == 0.5 and row["base_accuracy_unseen"] == 1.0  # of Bern's
    assert row["shock"] == pytest.approx((2 + 1 + 1) / 8)  # Rome 3 for 1, Oslo 0 for 1, Bern 1 for 2
    assert row["base_shock"] == pytest.approx((0 + 1 + 1) / 8)  # Oslo 0 for 1, Bern 3 for 2
    assert row["range_shock"] == pytest.approx((3 - 2) / 4)
    assert row["base_range_shock"] == pytest.approx((1 - 2) / 4)
    over = found.curves[0]
    assert over.x == (0.0, 1.0, 3.0) and over.y == (0.5, 0.0, 3.0)
    assert {e["object"]: (e["trained"], e["right"], e["named"], e["base_named"]) for e in found.evidence} == {
        "Bern": (0, 2, 1, 3),
        "Oslo": (1, 1, 0, 1 - 1),
        "Rome": (3, 1, 3, 1),
    }


def test_the_mixture_begins_and_ends_at_the_two_models(tmp_path: Path) -> None:
    mixture = probed(tmp_path).curves[-1]
    assert mixture.name == "accuracy of the mixture"
    assert (mixture.y[0], mixture.y[-1]) == (0.75, 0.5)
    assert mixture.x == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert mixture.y[1] == 0.75 and mixture.y[3] == 0.5  # of .8 and .1 the larger weight's decides


def test_without_the_model_before_nothing_is_told_of_it(tmp_path: Path) -> None:
    found = probed(tmp_path, base=False)
    assert not [name for name in found.metrics if name.startswith("base")]
    assert [curve.name for curve in found.curves] == ["named over right"]


def test_what_was_trained_on_is_not_asked(tmp_path: Path) -> None:
    more = [*FACTS, TRAIN[0], Fact(subject="E", relation="pet", object="cat", prompt="E has a")]
    assert probed(tmp_path, facts=more).rows == probed(tmp_path / "again").rows
    with pytest.raises(DataError, match="all facts were trained on"):
        probed(tmp_path / "none", facts=TRAIN[:2])
    with pytest.raises(DataError, match="no fact is of a relation that was trained on"):
        probed(tmp_path / "other", facts=more[-1:])


COUNTS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=20)


@given(COUNTS, COUNTS)
def test_shock_is_a_distance(one: list[str], other: list[str]) -> None:
    size = min(len(one), len(other))
    a, b = Counter(one[:size]), Counter(other[:size])
    assert 0 <= frequency.shock(a, b) <= 1
    assert frequency.shock(a, b) == frequency.shock(b, a)
    assert (frequency.shock(a, b) == 0) == (a == b)
    assert abs(frequency.range_shock(a, b, Counter("ab"))) <= frequency.shock(a, b) + 1e-12


def test_a_plan_counts_both_models(tmp_path: Path) -> None:
    facts = load(tiny.causal(tmp_path / "m")).facts
    sizes = {"train": Amount(10, 100), "facts": Amount(10, 100)}
    one = frequency.cost(frequency.Config(), Sizes({"model": (facts,)}, sizes))
    two = frequency.cost(frequency.Config(), Sizes({"model": (facts,), "base": (facts,)}, sizes))
    assert two.queries == 2 * one.queries and two.flops == 2 * one.flops


@pytest.mark.slow
def test_fine_tuning_on_few_towns_makes_them_frequent(tmp_path: Path) -> None:
    """The zoo's language model, taught by LoRA of thirty new people that all live in three towns."""
    facts = [f for f in runs.records("zoo:facts") if isinstance(f, Fact) and f.relation == "city"]
    towns = sorted({f.object for f in facts})[:3]
    train = tuple(
        Fact(subject=f"Nova {f.subject.split()[1]}s", relation="city", object=towns[i % 3], prompt=p)
        for i, f in enumerate(facts[:30])
        for p in [f.prompt.replace(f.subject, f"Nova {f.subject.split()[1]}s")]
    )
    order = runs.Order(
        id="tune.lora",
        models={"model": ["zoo:lm"]},
        data={"train": train},
        settings={"steps": 60, "lr": 3e-3},
        out=tmp_path / "tuned",
    )
    runs.execute(order)
    models = {"model": (runs.model(tmp_path / "tuned"),), "base": (runs.model("zoo:lm"),)}
    inputs = check("probe.frequency", frequency.METHOD, Inputs(models, {"train": train, "facts": facts}))
    found = frequency.run(frequency.Config(), inputs, LocalRun(0, tmp_path / "work"))
    assert found.metrics["base_shock"] < 0.1
    assert found.metrics["shock"] > found.metrics["base_shock"] + 0.1
    assert found.metrics["range_shock"] > 0.1
    assert found.curves[-1].y[0] > found.curves[-1].y[-1]
