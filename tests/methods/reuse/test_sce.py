"""reuse.sce: select, calculate, erase."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm.methods.reuse import sce
from methods.reuse.merging import agrees_with_mergekit, bare, merge, recorded, tensors, tuned


def case(here: Path) -> Case:
    for seed, name in enumerate(("base", "math", "code")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"base": ("base",), "models": ("math", "code")}, settings={"density": 0.5})


@pytest.mark.parametrize("name", recorded("sce"))
def test_it_agrees_with_mergekit(name: str, tmp_path: Path) -> None:
    agrees_with_mergekit(sce, name, tmp_path)


def test_closed_form(tmp_path: Path) -> None:
    """Changes (4, 0, 2), (0, 2, −1): weights 20/25 and 5/25; the last entry's sign is the first model's."""
    base = bare(tmp_path / "base.safetensors", {"w": torch.zeros(3)})
    a = bare(tmp_path / "a.safetensors", {"w": torch.tensor([4.0, 0.0, 2.0])})
    b = bare(tmp_path / "b.safetensors", {"w": torch.tensor([2.0, 2.0, -1.0])})
    found = tensors(merge(sce, tmp_path, {"base": [base], "models": [a, b]}))["w"]
    # energies 20 and 9
    torch.testing.assert_close(found, torch.tensor([(4 * 20 + 2 * 9) / 29, 2.0, 2.0]))
    # variances 1, 1, 2.25: of three that vary, one is selected; energies 4 and 1
    found = tensors(merge(sce, tmp_path, {"base": [base], "models": [a, b]}, density=0.34))["w"]
    assert found.tolist() == [0.0, 0.0, 2.0]


def test_equal_models_are_kept(tmp_path: Path) -> None:
    base, model = tuned(tmp_path, 1)
    found = tensors(merge(sce, tmp_path, {"base": [base], "models": [model, model]}))
    for name, known in tensors(model).items():
        torch.testing.assert_close(found[name], known, rtol=2.4e-7, atol=2.4e-7)
