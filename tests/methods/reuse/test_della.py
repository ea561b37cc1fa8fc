"""reuse.della, and what it shares with reuse.della_linear: small changes are dropped more often than large ones."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

import tiny
from case import Case
from lfm.core import Model, Weights
from lfm.core.errors import ConfigError
from lfm.methods.reuse import della, della_linear
from methods.reuse.merging import bare, merge, tensors, tuned

BOTH = (della, della_linear)


def case(here: Path) -> Case:
    for seed, name in enumerate(("base", "math", "code")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"base": ("base",), "models": ("math", "code")}, settings={"density": [0.4], "epsilon": [0.1]})


def ramp(work: Path, rows: int = 4000, width: int = 50) -> list[Model]:
    """A base of zeros and a model whose rows hold 1 … width, shuffled."""
    random = torch.Generator().manual_seed(0)
    changes = torch.stack([torch.randperm(width, generator=random) + 1.0 for _ in range(rows)])
    return [
        bare(work / "base.safetensors", {"w": torch.zeros(rows, width)}),
        bare(work / "m.safetensors", {"w": changes}),
    ]


@pytest.mark.parametrize("method", BOTH)
def test_how_often_each_rank_is_kept(method: ModuleType, tmp_path: Path) -> None:
    """Probability d − ε + 2ε (rank − 1)/(width − 1), and the mean of what is kept, grown, is the change."""
    base, model = ramp(tmp_path)
    settings = {"density": [0.5], "epsilon": [0.3]}
    found = tensors(merge(method, tmp_path, {"base": [base], "models": [model]}, **settings))["w"]
    changes = tensors(model)["w"]
    for rank in range(1, 51):
        known = 0.2 + 0.6 * (rank - 1) / 49
        mine = found[changes == rank]
        kept = (mine != 0).double().mean().item()
        assert abs(kept - known) < 5 * (known * (1 - known) / 4000) ** 0.5
        torch.testing.assert_close(mine[mine != 0], torch.full_like(mine[mine != 0], rank / known))


@pytest.mark.parametrize("method", BOTH)
def test_grown_to_the_norm_it_had(method: ModuleType, tmp_path: Path) -> None:
    """What mergekit does: |τ|₁ is the same before and after, whatever was dropped."""
    base, model = ramp(tmp_path)
    given = {"base": [base], "models": [model]}
    whole = tensors(merge(method, tmp_path, given, density=[0.4], rescale="norm"))["w"]
    torch.testing.assert_close(whole.abs().double().sum(), tensors(model)["w"].abs().double().sum(), rtol=1e-6, atol=0)
    plain = tensors(merge(method, tmp_path, given, density=[0.4], rescale="none"))["w"]
    assert torch.equal(plain != 0, whole != 0) and torch.equal(plain[plain != 0], tensors(model)["w"][plain != 0])


@pytest.mark.parametrize("method", BOTH)
def test_all_kept_and_cuts_never_show(method: ModuleType, tmp_path: Path) -> None:
    base, model = tuned(tmp_path, 1)
    given = {"base": [base], "models": [model]}
    found = tensors(merge(method, tmp_path, given, density=[1.0]))
    for name, known in tensors(model).items():
        torch.testing.assert_close(found[name], known, rtol=2.4e-7, atol=2.4e-7)
    merged = merge(method, tmp_path, given)
    lazy = merged.ask(Weights).tensors()["w"]
    cut = [lazy.read_flat(i, min(i + 70_001, 300_300)) for i in range(0, 300_300, 70_001)]
    assert torch.equal(torch.cat(cut), lazy.read().reshape(-1))


@pytest.mark.parametrize("method", BOTH)
def test_settings_that_make_no_sense(method: ModuleType, tmp_path: Path) -> None:
    base, model = tuned(tmp_path, 1)
    for wrong in ({"density": [0.1], "epsilon": [0.2]}, {"density": [0.9], "epsilon": [0.1]}, {"epsilon": [0.1, 0.1]}):
        with pytest.raises(ConfigError):
            merge(method, tmp_path, {"base": [base], "models": [model]}, **wrong)


def test_what_is_kept_agrees_in_sign(tmp_path: Path) -> None:
    start = bare(tmp_path / "base.safetensors", {"w": torch.zeros(3)})
    a = bare(tmp_path / "a.safetensors", {"w": torch.tensor([3.0, 1.0, 2.0])})
    b = bare(tmp_path / "b.safetensors", {"w": torch.tensor([-2.0, 3.0, -2.0])})
    found = tensors(merge(della, tmp_path, {"base": [start], "models": [a, b]}, density=[1.0]))["w"]
    assert found.tolist() == [3.0, 2.0, 0.0]  # the first alone; their mean; they cancel out
