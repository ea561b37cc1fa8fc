"""reuse.breadcrumbs: the middle of the changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm.methods.reuse import breadcrumbs
from methods.reuse.merging import agrees_with_mergekit, bare, merge, recorded, tensors, tuned


def case(here: Path) -> Case:
    for seed, name in enumerate(("base", "math", "code")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"base": ("base",), "models": ("math", "code")}, settings={"density": [0.6], "gamma": [0.1]})


@pytest.mark.parametrize("name", recorded("breadcrumbs"))
def test_it_agrees_with_mergekit(name: str, tmp_path: Path) -> None:
    agrees_with_mergekit(breadcrumbs, name, tmp_path)


def test_closed_form(tmp_path: Path) -> None:
    """Of ten changes 1 … 10: the largest is dropped (γ = 0.1), then half of all are kept: 9, 8, 7, 6, 5."""
    base = bare(tmp_path / "base.safetensors", {"w": torch.zeros(10)})
    model = bare(tmp_path / "m.safetensors", {"w": torch.arange(1.0, 11.0)})
    found = tensors(merge(breadcrumbs, tmp_path, {"base": [base], "models": [model]}, density=[0.5], gamma=[0.1]))["w"]
    assert found.tolist() == [0, 0, 0, 0, 5, 6, 7, 8, 9, 0]
    # γ + d > 1: fewer large ones are dropped, so that eight are kept
    found = tensors(merge(breadcrumbs, tmp_path, {"base": [base], "models": [model]}, density=[0.8], gamma=[0.5]))["w"]
    assert found.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0, 0]


def test_all_kept_is_the_model(tmp_path: Path) -> None:
    base, model = tuned(tmp_path, 1)
    for settings in ({"density": [1.0]}, {"density": [1.0], "gamma": [0.3]}):
        found = tensors(merge(breadcrumbs, tmp_path, {"base": [base], "models": [model]}, **settings))
        for name, known in tensors(model).items():
            torch.testing.assert_close(found[name], known, rtol=2.4e-7, atol=2.4e-7)


def test_the_middle_of_many_chunks(tmp_path: Path) -> None:
    base, model = tuned(tmp_path, 1)
    found = tensors(merge(breadcrumbs, tmp_path, {"base": [base], "models": [model]}, density=[0.6], gamma=[0.1]))["w"]
    start = tensors(base)["w"]
    size = (tensors(model)["w"] - start).abs().reshape(-1)
    order = size.argsort(descending=True)
    kept = torch.zeros(len(size), dtype=torch.bool)
    kept[order[int(0.1 * len(size)) : int(0.1 * len(size)) + int(0.6 * len(size))]] = True
    assert torch.equal((found != start).reshape(-1) & (size > 0), kept)
