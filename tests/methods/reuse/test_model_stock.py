"""reuse.model_stock: as far along the mean as the angle advises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm.methods.reuse import model_stock
from methods.reuse.merging import agrees_with_mergekit, bare, merge, recorded, tensors, tuned


def case(here: Path) -> Case:
    for seed, name in enumerate(("base", "a", "b")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"base": ("base",), "models": ("a", "b")})


@pytest.mark.parametrize("name", recorded("model_stock"))
def test_it_agrees_with_mergekit(name: str, tmp_path: Path) -> None:
    agrees_with_mergekit(model_stock, name, tmp_path)


def test_closed_form(tmp_path: Path) -> None:
    """Two changes at 60°: cos θ = ½, t = 2·½ / (1 + ½) = ⅔."""
    base = bare(tmp_path / "base.safetensors", {"w": torch.tensor([1.0, 1.0])})
    a = bare(tmp_path / "a.safetensors", {"w": torch.tensor([2.0, 1.0])})
    b = bare(tmp_path / "b.safetensors", {"w": torch.tensor([1.5, 1.0 + 0.75**0.5])})
    found = tensors(merge(model_stock, tmp_path, {"base": [base], "models": [a, b]}))["w"]
    torch.testing.assert_close(found, torch.tensor([1.0 + 0.75 * 2 / 3, 1.0 + 0.75**0.5 / 2 * 2 / 3]))


def test_equal_models_are_kept_and_opposite_ones_leave_the_base(tmp_path: Path) -> None:
    base, model = tuned(tmp_path, 1)
    found = tensors(merge(model_stock, tmp_path, {"base": [base], "models": [model, model]}, of="row"))
    for name, known in tensors(model).items():
        torch.testing.assert_close(found[name], known, rtol=2.4e-7, atol=2.4e-7)
    start = bare(tmp_path / "start.safetensors", {"w": torch.tensor([1.0, 2.0])})
    up = bare(tmp_path / "up.safetensors", {"w": torch.tensor([2.0, 3.0])})
    down = bare(tmp_path / "down.safetensors", {"w": torch.tensor([0.0, 1.0])})
    assert merge(model_stock, tmp_path, {"base": [start], "models": [up, down]}).digest == start.digest
