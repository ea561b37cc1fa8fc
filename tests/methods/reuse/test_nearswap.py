"""reuse.nearswap: weights that are near are swapped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm.methods.reuse import nearswap
from methods.reuse.merging import agrees_with_mergekit, bare, merge, recorded, tensors, tuned


def case(here: Path) -> Case:
    for seed, name in enumerate(("a", "b")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"base": ("a",), "models": ("b",)})


@pytest.mark.parametrize("name", recorded("nearswap"))
def test_it_agrees_with_mergekit(name: str, tmp_path: Path) -> None:
    agrees_with_mergekit(nearswap, name, tmp_path)


def test_closed_form(tmp_path: Path) -> None:
    base = bare(tmp_path / "base.safetensors", {"w": torch.tensor([1.0, 1.0, 1.0])})
    model = bare(tmp_path / "m.safetensors", {"w": torch.tensor([1.25, 5.0, 0.0])})
    merged = merge(nearswap, tmp_path, {"base": [base], "models": [model]}, t=0.5)
    assert tensors(merged)["w"].tolist() == [1.25, 1.5, 0.5]  # swapped; half a unit towards; half a unit towards


def test_none_moves_or_all_do(tmp_path: Path) -> None:
    base, model = tuned(tmp_path, 1)
    assert merge(nearswap, tmp_path, {"base": [base], "models": [model]}, t=0).digest == base.digest
    assert merge(nearswap, tmp_path, {"base": [base], "models": [model]}, t=10).digest == model.digest
