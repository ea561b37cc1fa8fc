"""reuse.ram: what one alone has changed is kept whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm.methods.reuse import ram
from methods.reuse.merging import agrees_with_mergekit, bare, merge, recorded, tensors, tuned


def case(here: Path) -> Case:
    for seed, name in enumerate(("base", "math", "code")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"base": ("base",), "models": ("math", "code")})


@pytest.mark.parametrize("name", recorded("ram"))
def test_it_agrees_with_mergekit(name: str, tmp_path: Path) -> None:
    agrees_with_mergekit(ram, name, tmp_path)


def test_closed_form(tmp_path: Path) -> None:
    base = bare(tmp_path / "base.safetensors", {"w": torch.ones(4)})
    a = bare(tmp_path / "a.safetensors", {"w": torch.tensor([3.0, 3.0, 1.25, 1.0])})
    b = bare(tmp_path / "b.safetensors", {"w": torch.tensor([1.0, 5.0, 1.0, 0.0])})
    found = tensors(merge(ram, tmp_path, {"base": [base], "models": [a, b]}, epsilon=0.5))["w"]
    assert found.tolist() == [3.0, 4.0, 1.0, 0.0]


def test_one_model_is_itself_and_the_base_stays(tmp_path: Path) -> None:
    base, model = tuned(tmp_path, 1)
    found = tensors(merge(ram, tmp_path, {"base": [base], "models": [model]}, epsilon=0))
    for name, known in tensors(model).items():
        torch.testing.assert_close(found[name], known, rtol=2.4e-7, atol=2.4e-7)
    assert merge(ram, tmp_path, {"base": [base], "models": [model]}, epsilon=100).digest == base.digest
