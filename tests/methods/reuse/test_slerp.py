"""reuse.slerp: along the arc between two models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm.methods.reuse import slerp
from methods.reuse.merging import agrees_with_mergekit, bare, merge, recorded, tensors, tuned


def case(here: Path) -> Case:
    for seed, name in enumerate(("a", "b")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"models": ("a", "b")}, settings={"t": 0.3})


@pytest.mark.parametrize("name", recorded("slerp"))
def test_it_agrees_with_mergekit(name: str, tmp_path: Path) -> None:
    agrees_with_mergekit(slerp, name, tmp_path)


def test_a_quarter_turn(tmp_path: Path) -> None:
    """Halfway between orthogonal unit vectors: (e₁ + e₂)/√2."""
    a = bare(tmp_path / "a.safetensors", {"w": torch.tensor([1.0, 0.0])})
    b = bare(tmp_path / "b.safetensors", {"w": torch.tensor([0.0, 1.0])})
    found = tensors(merge(slerp, tmp_path, {"models": [a, b]}))["w"]
    torch.testing.assert_close(found, torch.full((2,), 0.5**0.5))
    torch.testing.assert_close(
        tensors(merge(slerp, tmp_path, {"models": [a, b]}, t=1 / 3))["w"], torch.tensor([0.75**0.5, 0.5])
    )


@pytest.mark.parametrize("t", [0, 1])
def test_its_ends_are_the_models(t: int, tmp_path: Path) -> None:
    _, *given = tuned(tmp_path, 2, apart=2.0)
    assert merge(slerp, tmp_path, {"models": given}, t=t).digest == given[t].digest


def test_parallel_tensors_and_empty_ones_are_interpolated_on_the_line(tmp_path: Path) -> None:
    a = bare(tmp_path / "a.safetensors", {"w": torch.tensor([1.0, 2.0]), "zero": torch.zeros(3)})
    b = bare(tmp_path / "b.safetensors", {"w": torch.tensor([3.0, 6.0]), "zero": torch.zeros(3)})
    merged = tensors(merge(slerp, tmp_path, {"models": [a, b]}, t=0.5))
    assert merged["w"].tolist() == [2.0, 4.0] and merged["zero"].tolist() == [0.0] * 3
