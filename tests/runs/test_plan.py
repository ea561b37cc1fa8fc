"""What a run would take."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.core import Cost, Facts, Inputs, Logits, Logprobs, Model, Sizes, registry
from lfm.core import Text as Says
from lfm.core.interfaces import Codec, Gradients
from lfm.core.method import Amount
from lfm.data.records import Label, Text
from lfm.runs.machine import Machine
from lfm.runs.plan import HEADROOM, START_SECONDS, weigh
from lfm.runs.plan import plan as make_plan
from lfm.runs.verification import PROBES
from planted import METHODS, Settings

SMALL = Machine(device="cpu", cores=2, flops=1e11, memory=10**9, disk=10**9)


def test_a_cost_that_fits_lacks_nothing() -> None:
    assert weigh("a.b", Cost(flops=1e12, steps=10, memory=10**8, disk=10**8), SMALL).fits


def test_weights_take_time_to_go_by_and_evaluations_to_be_made(tmp_path: Path) -> None:
    assert weigh("a.b", Cost(), SMALL, reads=10**9).seconds[1] > weigh("a.b", Cost(), SMALL).seconds[1] + 10
    facts = Facts(parameters=10**9)
    model = Model(ref="m", kind="checkpoint", gives={Logprobs: object}, identify=lambda: "d", look=lambda: facts)
    ask = {"id": "prompt.manual", "method": METHODS["prompt.manual"][1], "config": Settings(), "out": tmp_path}
    inputs = Inputs({"model": (model,)}, {"train": ()})
    bare = make_plan(**ask, inputs=inputs, on=SMALL)
    measured = make_plan(**ask, inputs=inputs, on=SMALL, evals=[[Text(text="word " * 400)]])
    assert measured.seconds[0] - bare.seconds[0] == pytest.approx(4 * 1e9 * 500 / (0.8 * SMALL.flops))


def test_what_would_not_fit_is_named_with_both_numbers() -> None:
    plan = weigh(
        "a.b", Cost(memory=5 * 10**9, disk=3 * 10**9, queries=200, tokens=5000), SMALL, budget=(100, 1000), asks=True
    )
    assert not plan.fits
    assert [lack.split(":")[0] for lack in plan.lacks] == ["memory", "disk", "queries", "tokens"]
    assert "3.0 GB, 1.0 GB is free" in plan.lacks[1]
    assert "about 200, the budget is 100" in plan.lacks[2]


def test_an_unlimited_budget_limits_nothing() -> None:
    assert weigh("a.b", Cost(queries=10**9, tokens=10**9), SMALL, asks=True).fits


def test_a_model_that_lies_here_takes_no_queries() -> None:
    plan = weigh("a.b", Cost(queries=10**9, tokens=10**9), SMALL, budget=(1, 1))
    assert plan.fits and plan.queries == 0 and plan.seconds == START_SECONDS
    assert plan.here == 10**9 and weigh("a.b", Cost(queries=9), SMALL, asks=True).here == 0


@given(st.floats(0, 1e18), st.integers(0, 10**6), st.integers(0, 10**5))
def test_the_range_is_a_range_and_more_work_never_takes_less(flops: float, steps: int, queries: int) -> None:
    low, high = weigh("a.b", Cost(flops=flops, steps=steps, queries=queries), SMALL).seconds
    assert 0 <= low <= high
    longer = weigh("a.b", Cost(flops=2 * flops, steps=steps + 1, queries=queries), SMALL).seconds
    assert longer[0] >= low and longer[1] >= high


def test_memory_counts_what_python_and_torch_take() -> None:
    assert weigh("a.b", Cost(memory=7), SMALL).memory == HEADROOM + 7


def test_a_plan_opens_no_interface(tmp_path: Path) -> None:
    def opened() -> None:
        raise AssertionError("a plan reads no weights")

    kinds = (Gradients, Codec, Logits)
    model = Model(ref="m", kind="checkpoint", gives=dict.fromkeys(kinds, opened), identify=lambda: "d")
    inputs = Inputs({"teacher": (model,), "student": (model,)}, {"text": ()})
    plan = make_plan("distill.response", METHODS["distill.response"][1], Settings(), inputs, out=tmp_path, on=SMALL)
    assert plan.access == {"teacher": ["logits"], "student": ["codec", "logits", "gradients"]}
    assert plan.fits and plan.device == "cpu"


@pytest.mark.parametrize(("id", "each"), [("prompt.manual", 2), ("prompt.self_consistency", 40)])
def test_what_is_made_of_an_endpoint_is_asked_once_more_to_be_verified_and_measured(
    id: str, each: int, tmp_path: Path
) -> None:
    method = registry.get(id).method
    given = dict.fromkeys((Says, Logprobs), lambda: None)
    train = [Label(text="a b", label="x"), Label(text="c d", label="y")]
    endpoint = Model(ref="api:m", kind="api", gives=given, identify=lambda: "d")
    inputs = Inputs({"model": (endpoint,)}, {"train": train})
    told = [make_plan(id, method, method.config(), inputs, out=tmp_path, evals=e) for e in ((), (train, train))]
    sizes = Sizes({}, {"train": Amount(2, 8)}, labels={"train": 2})
    made = method.cost(method.config(), sizes._replace(models={"model": (Facts(),)}))
    assert [one.queries - made.queries for one in told] == [len(PROBES) * each, (len(PROBES) + 4) * each]
    assert told[1].tokens > told[0].tokens
