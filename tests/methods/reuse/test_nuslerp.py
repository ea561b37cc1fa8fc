"""reuse.nuslerp: an arc with a weight a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm.methods.reuse import nuslerp
from methods.reuse.merging import agrees_with_mergekit, bare, merge, recorded, tensors, tuned


def case(here: Path) -> Case:
    for seed, name in enumerate(("a", "b")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"models": ("a", "b")}, settings={"weights": [1, 3]})


@pytest.mark.parametrize("name", recorded("nuslerp"))
def test_it_agrees_with_mergekit(name: str, tmp_path: Path) -> None:
    agrees_with_mergekit(nuslerp, name, tmp_path)


def test_a_quarter_turn_from_a_base(tmp_path: Path) -> None:
    base = bare(tmp_path / "base.safetensors", {"w": torch.tensor([1.0, 1.0])})
    a = bare(tmp_path / "a.safetensors", {"w": torch.tensor([2.0, 1.0])})
    b = bare(tmp_path / "b.safetensors", {"w": torch.tensor([1.0, 2.0])})
    found = tensors(merge(nuslerp, tmp_path, {"base": [base], "models": [a, b]}, weights=[2, 1]))["w"]
    torch.testing.assert_close(found, torch.tensor([1.0 + 0.75**0.5, 1.5]))


@pytest.mark.parametrize("of", ["tensor", "row"])
def test_its_ends_are_the_models(of: str, tmp_path: Path) -> None:
    _, *given = tuned(tmp_path, 2, apart=2.0)
    for weights, known in (([1, 0], given[0]), ([0, 1], given[1])):
        assert merge(nuslerp, tmp_path, {"models": given}, weights=weights, of=of).digest == known.digest


def test_rows_turn_by_themselves(tmp_path: Path) -> None:
    a = bare(tmp_path / "a.safetensors", {"w": torch.tensor([[1.0, 0.0], [3.0, 4.0]])})
    b = bare(tmp_path / "b.safetensors", {"w": torch.tensor([[0.0, 1.0], [3.0, 4.0]])})
    found = tensors(merge(nuslerp, tmp_path, {"models": [a, b]}, of="row"))["w"]
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [3.0, 4.0]]))
