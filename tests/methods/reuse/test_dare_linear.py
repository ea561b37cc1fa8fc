"""reuse.dare_linear: most changes dropped, the rest grown."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm.core import Weights
from lfm.core.errors import ConfigError
from lfm.methods.reuse import dare_linear
from methods.reuse.merging import bare, merge, tensors, tuned


def case(here: Path) -> Case:
    for seed, name in enumerate(("base", "math", "code")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"base": ("base",), "models": ("math", "code")}, settings={"density": [0.3], "weights": [0.5]})


def test_what_is_kept_is_the_density_and_its_mean_is_the_change(tmp_path: Path) -> None:
    """Of 300 300 entries that all change by 1: kept ~ Binomial(n, d), grown by 1/d. Five standard deviations."""
    start = bare(tmp_path / "base.safetensors", {"w": torch.zeros(300, 1001)})
    moved = bare(tmp_path / "m.safetensors", {"w": torch.ones(300, 1001)})
    for density in (0.1, 0.5):
        merged = merge(dare_linear, tmp_path, {"base": [start], "models": [moved]}, density=[density])
        found = tensors(merged)["w"]
        kept = (found != 0).double().mean().item()
        assert abs(kept - density) < 5 * (density * (1 - density) / found.numel()) ** 0.5
        torch.testing.assert_close(found[found != 0], torch.full_like(found[found != 0], 1 / density))
        rows = (found != 0).double().mean(1)  # no row, column or neighbour tells of another
        assert abs(rows.std().item() - (density * (1 - density) / 1001) ** 0.5) < 0.2 * (density / 1001) ** 0.5
        joint = ((found[:, 1:] != 0) & (found[:, :-1] != 0)).double().mean().item()
        assert abs(joint - density**2) < 5 * (density**2 / found.numel()) ** 0.5


def test_models_are_dropped_each_by_itself(tmp_path: Path) -> None:
    start = bare(tmp_path / "base.safetensors", {"w": torch.zeros(100_000)})
    moved = bare(tmp_path / "m.safetensors", {"w": torch.ones(100_000)})
    found = tensors(merge(dare_linear, tmp_path, {"base": [start], "models": [moved, moved]}, density=[0.5]))["w"]
    shares = [(found == value).double().mean().item() for value in (0, 2, 4)]
    assert all(abs(share - known) < 0.01 for share, known in zip(shares, (0.25, 0.5, 0.25)))


def test_density_of_one_is_task_arithmetic_and_chunks_never_show(tmp_path: Path) -> None:
    base, *given = tuned(tmp_path, 2)
    whole = tensors(merge(dare_linear, tmp_path, {"base": [base], "models": given}, density=[1], weights=[0.5]))
    for name, known in whole.items():
        mean = (tensors(given[0])[name].double() + tensors(given[1])[name].double()) / 2
        torch.testing.assert_close(known, mean.float(), rtol=2.4e-7, atol=2.4e-7)
    merged = merge(dare_linear, tmp_path, {"base": [base], "models": given}, density=[0.3])
    lazy = merged.ask(Weights).tensors()["w"]
    cut = [lazy.read_flat(i, min(i + 70_001, 300_300)) for i in range(0, 300_300, 70_001)]
    assert torch.equal(torch.cat(cut), lazy.read().reshape(-1))
    again = merge(dare_linear, tmp_path, {"base": [base], "models": given}, density=[0.3])
    assert again.digest == merged.digest


def test_settings_that_make_no_sense(tmp_path: Path) -> None:
    base, *given = tuned(tmp_path, 2)
    for wrong in ({"density": [0]}, {"density": [0.1, 0.2, 0.3]}, {"weights": [1, 2, 3]}):
        with pytest.raises(ConfigError):
            merge(dare_linear, tmp_path, {"base": [base], "models": given}, **wrong)
