"""Thresholds: the value that a sort would find, however the numbers are cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.tensors.delta import change_thresholds, kth_magnitude
from lfm.tensors.lazy import Held

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def by_sorting(values: torch.Tensor, keep: int) -> float:
    return 0.0 if keep >= len(values) else values.abs().double().sort(descending=True).values[keep - 1].item()


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.floats(-6e4, 6e4, allow_nan=False), min_size=1, max_size=60),
    st.integers(1, 70),
    st.integers(1, 20),
)
def test_it_is_the_kth_largest(dtype: torch.dtype, numbers: list[float], keep: int, chunk: int) -> None:
    values = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    cuts = [lambda part=part: part for part in values.split(chunk)]
    assert kth_magnitude(cuts, keep) == by_sorting(values, keep)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [1, 2, 777, 100_000, 299_999, 300_000, 300_001])
def test_it_is_exact_on_many(dtype: torch.dtype, keep: int) -> None:
    values = (torch.randn(300_000, generator=torch.Generator().manual_seed(0)) * 1e-3).to(dtype)
    for workers in (1, 3):
        found = kth_magnitude([lambda p=p: p for p in values.split(40_000)], keep, workers=workers)
        assert found == by_sorting(values, keep)


@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_zeros_subnormals_and_the_largest(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    values = torch.tensor(
        [0.0, -0.0, info.smallest_normal / 2, -info.smallest_normal, info.max, -info.max, 1.0, -1.0]
    ).to(dtype)
    for keep in range(1, 9):
        assert kth_magnitude([lambda: values], keep) == by_sorting(values, keep)


def test_scope() -> None:
    base = {"a": Held(torch.zeros(10)), "b": Held(torch.ones(10, dtype=torch.bfloat16)), "none": Held(torch.empty(0))}
    model = {
        "a": Held(torch.arange(10.0) / 10),  # changes 0, .1, … .9
        "b": Held(torch.arange(1, 11).bfloat16()),  # changes 0, 1, … 9
        "none": Held(torch.empty(0)),
    }
    names = ["a", "b", "none"]
    assert change_thresholds(base, model, names, 0.2, "tensor") == {
        "a": torch.tensor(0.8).item(),
        "b": 8.0,
        "none": 0.0,
    }
    assert change_thresholds(base, model, names, 0.2, "model") == {"a": 6.0, "b": 6.0, "none": 6.0}
    assert change_thresholds(base, model, names, 0.01, "tensor") == {
        "a": torch.tensor(0.9).item(),
        "b": 9.0,
        "none": 0.0,
    }
    assert change_thresholds(base, model, names, 1.0, "model") == {"a": 0.0, "b": 0.0, "none": 0.0}


def test_scope_over_tensors_of_different_width() -> None:
    base = {"a": Held(torch.zeros(3, dtype=torch.float64)), "b": Held(torch.zeros(3))}
    model = {"a": Held(torch.tensor([1.0, 2.0, 3.0 + 1e-12]).double()), "b": Held(torch.tensor([0.5, 2.5, 3.5]))}
    assert change_thresholds(base, model, ["a", "b"], 0.5, "model") == {"a": 2.5, "b": 2.5}
