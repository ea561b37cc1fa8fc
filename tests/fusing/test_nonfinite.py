"""NaN and infinities, where they are let through: IEEE arithmetic, and formats that hold what they should."""

from __future__ import annotations

import pytest
import torch

from lfm.core.errors import CorruptError
from lfm.fusing import Each, Rule, fuse
from lfm.tensors.lazy import Held, map_tensors
from lfm.tensors.refusal import accepting_nonfinite

BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def total(base, x: Each, one: float):
    return x[0] * one


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    like = {"t": Held(torch.empty(0, dtype=dtype))}
    rule = Rule(total, given=lambda name: {"one": 1.0})
    with accepting_nonfinite(True):
        made = fuse(rule, ["t"], [{"t": Held(x)}], base={"t": Held(x)}, like=like)
    return made["t"].read()  # read outside: what was decided when it was made counts


@pytest.mark.parametrize("to", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_pattern_as_torch_converts_it(dtype: torch.dtype, to: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    torch.testing.assert_close(rounded(every, to), every.to(to), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("to", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_numbers_and_any_payload_of_a_nan(dtype: torch.dtype, to: torch.dtype) -> None:
    ones = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7F7FFFFF], dtype=torch.int32).view(torch.float32)
    large = torch.tensor([65519.0, 65520.0, -65536.0, 1e30, -1e38, float("inf"), -float("inf"), float("nan")])
    values = torch.cat([ones, large]).to(dtype)
    torch.testing.assert_close(rounded(values, to), values.to(to), rtol=0, atol=0, equal_nan=True)


def test_outside_they_are_refused_whatever_was_let_through_before() -> None:
    bad = [{"t": Held(torch.tensor([1.0, float("inf")]))}]
    with accepting_nonfinite(True):
        let = map_tensors(["t"], lambda _, x: x - x, bad)
        refused = None
        with accepting_nonfinite(False):
            refused = map_tensors(["t"], lambda _, x: x - x, bad)
    assert let["t"].read().isnan().tolist() == [False, True]
    for strict in (refused, map_tensors(["t"], lambda _, x: x - x, bad)):
        with pytest.raises(CorruptError, match="'t' holds a NaN or an infinity"):
            strict["t"].read()
