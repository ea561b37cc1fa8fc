"""reuse.task_arithmetic: changes added to the base, and taken away."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm.methods.reuse import task_arithmetic
from methods.reuse.merging import agrees_with_mergekit, bare, merge, recorded, tensors, tuned


def case(here: Path) -> Case:
    for seed, name in enumerate(("base", "math", "code")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"base": ("base",), "models": ("math", "code")}, settings={"weights": [1, -1]})


@pytest.mark.parametrize("name", recorded("task_arithmetic"))
def test_it_agrees_with_mergekit(name: str, tmp_path: Path) -> None:
    agrees_with_mergekit(task_arithmetic, name, tmp_path)


def test_closed_form(tmp_path: Path) -> None:
    base = bare(tmp_path / "base.safetensors", {"w": torch.tensor([1.0, 2.0, -0.0])})
    a = bare(tmp_path / "a.safetensors", {"w": torch.tensor([2.0, 2.0, 0.0])})
    b = bare(tmp_path / "b.safetensors", {"w": torch.tensor([1.0, 6.0, 0.0])})
    given = {"base": [base], "models": [a, b]}
    assert tensors(merge(task_arithmetic, tmp_path, given, weights=[2, -1], scale=1))["w"].tolist() == [3.0, -2.0, 0.0]
    assert tensors(merge(task_arithmetic, tmp_path, given, scale=0.5))["w"].tolist() == [1.5, 4.0, 0.0]
    mean = merge(task_arithmetic, tmp_path, given, scale=1, normalize=True)
    assert tensors(mean)["w"].tolist() == [1.5, 4.0, 0.0]
    assert merge(task_arithmetic, tmp_path, given, weights=[0]).digest == base.digest


def test_adding_a_change_and_taking_it_away_leaves_the_base(tmp_path: Path) -> None:
    base, model = tuned(tmp_path, 1)
    merged = merge(task_arithmetic, tmp_path, {"base": [base], "models": [model, model]}, weights=[1, -1])
    assert merged.digest == base.digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounded_once_to_nearest_even(dtype: torch.dtype, tmp_path: Path) -> None:
    """Each result is the stored number nearest to the exact one; sums of a few numbers of 24 bits are exact in fp64."""
    random = torch.Generator().manual_seed(0)
    values = [torch.randn(50_000, generator=random).to(dtype) for _ in range(3)]
    base, *given = (bare(tmp_path / f"{i}.safetensors", {"w": v}) for i, v in enumerate(values))
    found = tensors(merge(task_arithmetic, tmp_path, {"base": [base], "models": given}, scale=0.5))["w"]
    exact = (values[1].double() + values[2].double()) / 2
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    raw = found.view(bits)
    raw, exact = raw[found != 0], exact[found != 0]
    found = raw.view(dtype)
    for beside in (raw - 1, raw + 1):
        other = beside.view(dtype)
        apart, instead = (found.double() - exact).abs(), (other.double() - exact).abs()
        assert (apart <= instead).all()
        assert ((raw & 1) == 0)[(apart == instead) & (found.double() != exact)].all()
