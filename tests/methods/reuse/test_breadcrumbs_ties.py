"""reuse.breadcrumbs_ties: the middle of the changes, merged by sign."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm.methods.reuse import breadcrumbs_ties
from methods.reuse.merging import agrees_with_mergekit, bare, merge, recorded, tensors, tuned


def case(here: Path) -> Case:
    for seed, name in enumerate(("base", "math", "code")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"base": ("base",), "models": ("math", "code")}, settings={"density": [0.6], "gamma": [0.1]})


@pytest.mark.parametrize("name", recorded("breadcrumbs_ties"))
def test_it_agrees_with_mergekit(name: str, tmp_path: Path) -> None:
    agrees_with_mergekit(breadcrumbs_ties, name, tmp_path)


def test_closed_form(tmp_path: Path) -> None:
    """Kept: 1 … 4 of the first, −2 … −5 of the second (each's largest is dropped); the larger total's sign stays."""
    base = bare(tmp_path / "base.safetensors", {"w": torch.zeros(5)})
    a = bare(tmp_path / "a.safetensors", {"w": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])})
    b = bare(tmp_path / "b.safetensors", {"w": torch.tensor([-2.0, -3.0, 4.0, -5.0, 6.0])})
    settings = {"density": [0.8], "gamma": [0.2]}
    found = tensors(merge(breadcrumbs_ties, tmp_path, {"base": [base], "models": [a, b]}, **settings))["w"]
    assert found.tolist() == [-2.0, -3.0, 7.0, -5.0, 0.0]
    mean = tensors(merge(breadcrumbs_ties, tmp_path, {"base": [base], "models": [a, b]}, normalize=True, **settings))[
        "w"
    ]
    assert mean.tolist() == [-2.0, -3.0, 3.5, -5.0, 0.0]


def test_one_model_kept_whole_is_that_model(tmp_path: Path) -> None:
    base, model = tuned(tmp_path, 1)
    found = tensors(merge(breadcrumbs_ties, tmp_path, {"base": [base], "models": [model]}, density=[1.0]))
    for name, known in tensors(model).items():
        torch.testing.assert_close(found[name], known, rtol=2.4e-7, atol=2.4e-7)
