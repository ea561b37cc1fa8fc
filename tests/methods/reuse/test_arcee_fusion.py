"""reuse.arcee_fusion: what matters most is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm.methods.reuse import arcee_fusion
from methods.reuse.merging import agrees_with_mergekit, bare, merge, recorded, tensors, tuned


def case(here: Path) -> Case:
    for seed, name in enumerate(("a", "b")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"base": ("a",), "models": ("b",)})


@pytest.mark.parametrize("name", recorded("arcee_fusion"))
def test_it_agrees_with_mergekit(name: str, tmp_path: Path) -> None:
    agrees_with_mergekit(arcee_fusion, name, tmp_path)


def test_it_is_the_dense_computation(tmp_path: Path) -> None:
    base, model = tuned(tmp_path, 1)
    found = tensors(merge(arcee_fusion, tmp_path, {"base": [base], "models": [model]}))["w"]
    a, b = tensors(model)["w"].double(), tensors(base)["w"].double()
    p, q = a.softmax(-1) + 1e-8, b.softmax(-1) + 1e-8
    score = ((a - b).abs() * (p * (p / q).log()).sum(-1, keepdim=True)).float()
    ordered = score.reshape(-1).sort().values
    low, median, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    known = torch.where(score >= median + 1.5 * (high - low), tensors(model)["w"], tensors(base)["w"])
    assert (found != known).double().mean() < 1e-5  # sums in another order move a score across the threshold
    assert 0.001 < (found != tensors(base)["w"]).double().mean() < 0.2


def test_a_model_equal_to_the_base_is_the_base(tmp_path: Path) -> None:
    base = bare(tmp_path / "base.safetensors", {"w": torch.randn(4, 5)})
    assert merge(arcee_fusion, tmp_path, {"base": [base], "models": [base]}).digest == base.digest
