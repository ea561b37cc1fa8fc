"""reuse.dare_ties: most changes dropped, the rest grown and merged by sign."""

from __future__ import annotations

from pathlib import Path

import torch

import tiny
from case import Case
from lfm.methods.reuse import dare_linear, dare_ties
from methods.reuse.merging import bare, merge, tensors, tuned


def case(here: Path) -> Case:
    for seed, name in enumerate(("base", "math", "code")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"base": ("base",), "models": ("math", "code")}, settings={"density": [0.3]})


def test_what_is_kept_agrees_in_sign(tmp_path: Path) -> None:
    """Changes 3 and −2, each kept with probability ½ and doubled: 6 where both or the first are kept, −4, or 0."""
    start = bare(tmp_path / "base.safetensors", {"w": torch.zeros(100_000)})
    a = bare(tmp_path / "a.safetensors", {"w": torch.full((100_000,), 3.0)})
    b = bare(tmp_path / "b.safetensors", {"w": torch.full((100_000,), -2.0)})
    found = tensors(merge(dare_ties, tmp_path, {"base": [start], "models": [a, b]}, density=[0.5]))["w"]
    shares = [(found == value).double().mean().item() for value in (6, -4, 0)]
    assert sum(shares) == 1 and all(abs(share - known) < 0.01 for share, known in zip(shares, (0.5, 0.25, 0.25)))


def test_of_one_model_it_is_dare_linear(tmp_path: Path) -> None:
    base, model = tuned(tmp_path, 1)
    settings = {"density": [0.3], "scale": 0.5}
    both = [merge(m, tmp_path, {"base": [base], "models": [model]}, **settings) for m in (dare_ties, dare_linear)]
    assert both[0].digest == both[1].digest


def test_several_that_agree_have_their_mean(tmp_path: Path) -> None:
    base, model = tuned(tmp_path, 1)
    merged = tensors(merge(dare_ties, tmp_path, {"base": [base], "models": [model, model]}, density=[1]))
    for name, known in tensors(model).items():
        torch.testing.assert_close(merged[name], known, rtol=2.4e-7, atol=2.4e-7)
    added = tensors(merge(dare_ties, tmp_path, {"base": [base], "models": [model] * 2}, density=[1], normalize=False))
    for name, known in tensors(model).items():
        torch.testing.assert_close(added[name], 2 * known - tensors(base)[name], rtol=4.8e-7, atol=1e-6)
