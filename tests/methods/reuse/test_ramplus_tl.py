"""reuse.ramplus_tl: what one alone has changed is grown."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm.methods.reuse import ram, ramplus_tl
from methods.reuse.merging import agrees_with_mergekit, bare, merge, recorded, tensors, tuned


def case(here: Path) -> Case:
    for seed, name in enumerate(("base", "math", "code")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"base": ("base",), "models": ("math", "code")})


@pytest.mark.parametrize("name", recorded("ramplus_tl"))
def test_it_agrees_with_mergekit(name: str, tmp_path: Path) -> None:
    agrees_with_mergekit(ramplus_tl, name, tmp_path)


def test_closed_form(tmp_path: Path) -> None:
    """The first shares one entry and has two alone: ρ = ½, λ = 1 + 0.4·½; the second has none alone."""
    base = bare(tmp_path / "base.safetensors", {"w": torch.zeros(4)})
    a = bare(tmp_path / "a.safetensors", {"w": torch.tensor([1.0, 2.0, 4.0, 0.0])})
    b = bare(tmp_path / "b.safetensors", {"w": torch.tensor([0.0, 0.0, 2.0, 0.0])})
    found = tensors(merge(ramplus_tl, tmp_path, {"base": [base], "models": [a, b]}, r=0.4, alpha=2))["w"]
    torch.testing.assert_close(found, torch.tensor([1.2, 2.4, 3.0, 0.0]))
    capped = tensors(merge(ramplus_tl, tmp_path, {"base": [base], "models": [a, b]}, r=0.4, alpha=0.25))["w"]
    torch.testing.assert_close(capped, torch.tensor([1.1, 2.2, 3.0, 0.0]))


def test_without_growth_it_is_ram(tmp_path: Path) -> None:
    base, *given = tuned(tmp_path, 2)
    both = [
        merge(method, tmp_path, {"base": [base], "models": given}, epsilon=0.05, **settings)
        for method, settings in ((ram, {}), (ramplus_tl, {"r": 0}))
    ]
    assert both[0].digest == both[1].digest
