"""reuse.karcher: the point from which all arcs cancel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm.methods.reuse import karcher
from methods.reuse.merging import agrees_with_mergekit, bare, merge, recorded, tensors, tuned


def case(here: Path) -> Case:
    for seed, name in enumerate(("a", "b")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"models": ("a", "b")})


@pytest.mark.parametrize("name", recorded("karcher"))
def test_it_agrees_with_mergekit(name: str, tmp_path: Path) -> None:
    agrees_with_mergekit(karcher, name, tmp_path)


def test_the_middle_of_three_axes(tmp_path: Path) -> None:
    given = [bare(tmp_path / f"{i}.safetensors", {"w": 2 * row}) for i, row in enumerate(torch.eye(3))]
    torch.testing.assert_close(tensors(merge(karcher, tmp_path, {"models": given}))["w"], torch.full((3,), 2 * 3**-0.5))


def test_of_two_it_is_a_point_of_their_arc(tmp_path: Path) -> None:
    """Weights 2 and 1: a third of the quarter turn."""
    given = [bare(tmp_path / f"{i}.safetensors", {"w": row.clone()}) for i, row in enumerate(torch.eye(2))]
    found = tensors(merge(karcher, tmp_path, {"models": given}, weights=[2, 1], max_iter=50, tol=1e-12))["w"]
    torch.testing.assert_close(found, torch.tensor([0.75**0.5, 0.5]))


def test_equal_models_stay_so_and_nothing_makes_nothing(tmp_path: Path) -> None:
    base, _ = tuned(tmp_path, 1)
    found = tensors(merge(karcher, tmp_path, {"models": [base] * 3}))
    for name, known in tensors(base).items():
        torch.testing.assert_close(found[name], known, rtol=2.4e-7, atol=0)
    zero = bare(tmp_path / "zero.safetensors", {"w": torch.zeros(4)})
    assert merge(karcher, tmp_path, {"models": [zero, zero]}).digest == zero.digest
