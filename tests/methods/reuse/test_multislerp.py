"""reuse.multislerp: a mean on the sphere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm.core.errors import MismatchError
from lfm.methods.reuse import multislerp
from methods.reuse.merging import agrees_with_mergekit, bare, merge, recorded, tensors, tuned


def case(here: Path) -> Case:
    for seed, name in enumerate(("a", "b")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"models": ("a", "b")}, settings={"weights": [1, 3]})


@pytest.mark.parametrize("name", recorded("multislerp"))
def test_it_agrees_with_mergekit(name: str, tmp_path: Path) -> None:
    agrees_with_mergekit(multislerp, name, tmp_path)


def test_the_middle_of_three_axes(tmp_path: Path) -> None:
    """Equal weights of e₁, e₂, e₃: by symmetry (e₁ + e₂ + e₃)/√3."""
    given = [bare(tmp_path / f"{i}.safetensors", {"w": row.clone()}) for i, row in enumerate(torch.eye(3))]
    found = tensors(merge(multislerp, tmp_path, {"models": given}))["w"]
    torch.testing.assert_close(found, torch.full((3,), 3**-0.5))


def test_models_that_cancel_out(tmp_path: Path) -> None:
    a = bare(tmp_path / "a.safetensors", {"w": torch.tensor([1.0, 0.0])})
    b = bare(tmp_path / "b.safetensors", {"w": torch.tensor([-1.0, 0.0])})
    assert tensors(merge(multislerp, tmp_path, {"models": [a, b]}))["w"].tolist() == [0.0, 0.0]
    with pytest.raises(MismatchError, match="cancel out in 'w'"):
        merge(multislerp, tmp_path, {"models": [a, b, b]}, weights=[2, 1, 1]).digest  # noqa: B018


def test_equal_models_stay_so(tmp_path: Path) -> None:
    base, model = tuned(tmp_path, 1)
    found = tensors(merge(multislerp, tmp_path, {"base": [base], "models": [model] * 3}))
    for name, known in tensors(model).items():
        torch.testing.assert_close(found[name], known, rtol=2.4e-7, atol=2.4e-7)
