"""reuse.passthrough: one model, multiplied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm.methods.reuse import passthrough
from methods.reuse.merging import agrees_with_mergekit, merge, recorded, tensors, tuned


def case(here: Path) -> Case:
    for seed, name in enumerate(("a",)):
        tiny.causal(here / name, seed=seed)
    return Case(models={"models": ("a",)}, settings={"scale": 0.9})


@pytest.mark.parametrize("name", recorded("passthrough"))
def test_it_agrees_with_mergekit(name: str, tmp_path: Path) -> None:
    agrees_with_mergekit(passthrough, name, tmp_path)


def test_one_is_the_model_itself(tmp_path: Path) -> None:
    base, _ = tuned(tmp_path, 1)
    assert merge(passthrough, tmp_path, {"models": [base]}).digest == base.digest
    halved = tensors(merge(passthrough, tmp_path, {"models": [base]}, scale=0.5))
    assert all(torch.equal(halved[name], known / 2) for name, known in tensors(base).items())
