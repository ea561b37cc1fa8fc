"""reuse.lines against its equation, its identities, and the paper's choice of α."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm.core import Model
from lfm.core.errors import ConfigError, MismatchError
from lfm.methods.reuse import linear, lines, task_arithmetic, ties
from methods.reuse.merging import bare, merge, tensors

SHAPES = {"emb": (7, 3), "h.0.w": (3, 3), "h.1.w": (3, 3), "h.2.w": (3, 3), "norm": (3,), "head": (7, 3)}
DEPTH = {"emb": 0.0, "h.0.w": 0.0, "h.1.w": 0.5, "h.2.w": 1.0, "norm": 0.0, "head": 0.0}


def case(here: Path) -> Case:
    for seed, name in enumerate(("base", "math", "code")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"base": ("base",), "models": ("math", "code")}, settings={"beta": 0.6})


@pytest.fixture
def given(tmp_path: Path) -> list[Model]:
    """A base and three models."""
    random = torch.Generator().manual_seed(0)
    return [
        bare(tmp_path / f"{i}.safetensors", {n: torch.randn(s, generator=random) for n, s in SHAPES.items()})
        for i in range(4)
    ]


def by_hand(base: Model, changed: dict[str, torch.Tensor], scales: dict[str, float]) -> dict[str, torch.Tensor]:
    return {name: t.double() + scales[name] * changed[name] for name, t in tensors(base).items()}


def close(made: Model, known: dict[str, torch.Tensor]) -> None:
    for name, value in tensors(made).items():
        torch.testing.assert_close(value.double(), known[name], rtol=1e-7, atol=1e-7)


def summed(base: Model, models: list[Model]) -> dict[str, torch.Tensor]:
    start = tensors(base)
    return {name: sum(tensors(m)[name].double() - start[name].double() for m in models) for name in start}  # type: ignore[misc]


def test_the_equation_on_several_models(given: list[Model], tmp_path: Path) -> None:
    base, *models = given
    made = merge(lines, tmp_path, {"base": [base], "models": models}, alpha=0.2, beta=0.6)
    close(made, by_hand(base, summed(base, models), {n: 0.2 + 0.6 * d for n, d in DEPTH.items()}))


def test_left_out_scales_are_the_papers(given: list[Model], tmp_path: Path) -> None:
    base, *models = given
    several = merge(lines, tmp_path, {"base": [base], "models": models})
    close(several, by_hand(base, summed(base, models), {n: 1 / 3 + lines.RISE * d for n, d in DEPTH.items()}))
    one = merge(lines, tmp_path, {"base": [base], "models": models[:1]}, alpha=0.3)
    close(one, by_hand(base, summed(base, models[:1]), {n: 0.3 + 0.7 * d for n, d in DEPTH.items()}))
    assert torch.equal(tensors(one)["h.2.w"], tensors(models[0])["h.2.w"]), "the last block stays the model's own"


def test_of_a_merged_change_the_first_block_has_the_means_length(given: list[Model], tmp_path: Path) -> None:
    """α = ‖Σ τᵢ‖₁ / ‖τ‖₁ / N, computed here on whole tensors."""
    base, *models = given
    merged = merge(ties, tmp_path, {"base": [base], "models": models}, density=0.3)
    made = merge(lines, tmp_path, {"base": [base], "models": models, "merged": [merged]}, beta=0.25)
    change = summed(base, [merged])
    whole, part = (sum(float(t.abs().sum()) for t in c.values()) for c in (summed(base, models), change))
    close(made, by_hand(base, change, {n: whole / part / 3 + 0.25 * d for n, d in DEPTH.items()}))


def test_without_a_rise_it_is_task_arithmetic_and_by_default_the_first_block_is_averaged(
    given: list[Model], tmp_path: Path
) -> None:
    base, *models = given
    roles = {"base": [base], "models": models}
    flat = merge(lines, tmp_path, roles, alpha=0.4, beta=0)
    assert flat.digest == merge(task_arithmetic, tmp_path, roles, scale=0.4).digest
    mean = tensors(merge(linear, tmp_path, {"models": models}))
    made = tensors(merge(lines, tmp_path, roles))
    for name in ("emb", "h.0.w", "norm"):
        torch.testing.assert_close(made[name], mean[name], rtol=1e-6, atol=1e-6)


def test_what_is_named_last_is_scaled_as_the_last_block(given: list[Model], tmp_path: Path) -> None:
    base, *models = given
    made = merge(lines, tmp_path, {"base": [base], "models": models}, alpha=0.1, beta=0.5, last=["head", "nor"])
    deep = DEPTH | {"head": 1.0, "norm": 1.0}
    close(made, by_hand(base, summed(base, models), {n: 0.1 + 0.5 * d for n, d in deep.items()}))
    with pytest.raises(ConfigError, match=r"no tensor outside the blocks has 'h\.2'"):
        merge(lines, tmp_path, {"base": [base], "models": models}, last=["h.2"])


def test_models_without_blocks_are_refused(tmp_path: Path) -> None:
    base = bare(tmp_path / "base.safetensors", {"w": torch.ones(3)})
    with pytest.raises(MismatchError, match="no numbered blocks"):
        merge(lines, tmp_path, {"base": [base], "models": [base]})
