"""Merge fine-tuned models without letting their changes cancel: trim, elect a sign, average those that agree.

    τᵢ = the fraction `density` of θᵢ − θ_base that is largest, else 0
    γ  = sgn(Σᵢ wᵢ τᵢ)                  elementwise: the larger total's sign
    τ  = Σᵢ wᵢ τᵢ [sgn τᵢ = γ] / Σᵢ wᵢ [sgn τᵢ = γ]
    θ  = θ_base + λ τ                                     (`scale` is λ)

Paper: TIES-Merging, arXiv 2306.01708. As in the paper, and unlike mergekit, the default trims over the whole model
(`scope` model; with `tensor` each tensor is trimmed by itself, as mergekit does), keeps 20 % and has λ = 1. Different
from the paper: the model weights wᵢ (all 1 there). Entries of equal magnitude at the threshold are all kept, so that
the result rests on no order. Where the signed totals cancel exactly, γ = 0 and the base stays; the authors' code takes
the sign that most of the model has, mergekit the positive one.

Models: equal architecture, vocabulary, tensor names and shapes, the base's too. The result has the base's files and
dtypes; arithmetic is in fp64 and rounded once, thresholds are exact. Integer tensors must be equal in all. Tensors are
streamed, once for the thresholds of all models and once for the result: memory does not grow with the model. Errors:
MismatchError before any weight is read; ConfigError for weights of another number; CorruptError naming a tensor that
holds a NaN or an infinity.

    lfm run reuse.ties base=base models=math models=code --set density=0.2 --out merged
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import lfm.core
from lfm.core import Meta, Method, Run
from lfm.fusing import Rule, fuse, kth_largest_each
from lfm.fusing.inputs import (
    BASE_AND_TUNED,
    Cancelled,
    Densities,
    Normalize,
    Regrow,
    Scale,
    Tensors,
    Weighting,
    agree,
    by_setting,
    elected,
    known,
    one_each,
    streamed,
    whole,
)
from lfm.fusing.joins import agreed, change, magnitude
from lfm.fusing.masks import between, regrown
from lfm.tensors.lazy import size

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


Scope = Literal["model", "tensor"]
Trim = tuple[Scope, tuple[float, ...]]
"""Of what the largest changes are chosen, and the fraction for each model."""


class Config(lfm.core.Config, frozen=True):
    density: Densities = (0.2,)
    scale: Scale = 1.0
    scope: Annotated[Scope, Meta(description="what the largest changes are chosen from: the model, or each tensor")] = (
        "model"
    )
    weights: Weighting = ()
    rescale: Regrow = False
    normalize: Normalize = True
    cancelled: Cancelled = "base"


def merge(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], configs: Callable[[str], Config], run: Run
) -> dict[str, LazyTensor]:
    assert base is not None
    count = len(models)
    trims: dict[str, Trim] = {
        name: (configs(name).scope, tuple(one_each("density", configs(name).density, count))) for name in names
    }
    kept = known(run, "trim", names, partial(limits, names, base, models, trims))
    to_norm = [name for name in names if configs(name).rescale]
    grown = [
        regrown(to_norm, base, model, {n: (kept[n][i], float("inf")) for n in to_norm}) if to_norm else {}
        for i, model in enumerate(models)
    ]

    def given(name: str) -> dict[str, Any]:
        mine = {
            "low": kept[name],
            "high": [float("inf")] * count,
            "grow": [of.get(name, 1.0) for of in grown],
        }
        return elected(configs(name), count) | mine

    return fuse(Rule(agreed, first=between, given=given), names, models, base=base)


def limits(
    names: Sequence[str], base: Tensors, models: Sequence[Tensors], trims: Mapping[str, Trim]
) -> dict[str, list[float]]:
    """By name and model, the magnitude that a fraction of the changes reaches: the tensor's own, or all with that
    fraction."""

    def least(trim: Trim, some: list[str]) -> dict[str, list[float]]:
        scope, densities = trim
        groups = [some] if scope == "model" else [[name] for name in some]
        counts = [sum(size(base[name]) for name in group) for group in groups]
        keep = [[max(1, int(density * count)) if density else 0 for density in densities] for count in counts]
        asked = [[[k] if 0 < k < count else [] for k in kept] for kept, count in zip(keep, counts)]
        found = kth_largest_each(Rule(magnitude, first=change), groups, models, asked, base=base)
        every = [0.0 if density else float("inf") for density in densities]
        return {
            name: [limit[0] if limit else none for limit, none in zip(limits, every)]
            for group, limits in zip(groups, found)
            for name in group
        }

    return by_setting(names, trims.__getitem__, least)


METHOD = Method(
    paper="arXiv:2306.01708",
    config=Config,
    models=BASE_AND_TUNED,
    run=whole(merge),
    cost=streamed(30),
    agree=agree,
    merge=merge,
)
