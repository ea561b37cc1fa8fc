"""Merge the middle of fine-tuned models' changes, neither the largest nor the smallest, where their signs agree.

    τᵢ = θᵢ − θ_base where its magnitude is among the fraction d after the largest γ of the tensor's, else 0
    γ′ = sgn(Σᵢ wᵢ τᵢ)
    θ  = θ_base + λ Σᵢ wᵢ τᵢ [sgn wᵢτᵢ = γ′]    (`density` is d, `gamma` γ, `scale` λ; with `normalize` by Σᵢ wᵢ[…])

Paper: Model Breadcrumbs, arXiv 2312.06795, with the signs of TIES-Merging, arXiv 2306.01708: masks of each tensor.
Where the signed sum is 0, the base stays. As in mergekit, where γ and d leave nothing over at the small end (γ + d >
1), fewer large ones are dropped, so that d are kept; d = 1 keeps all. Entries of equal magnitude at either threshold go
the same way, so that the result rests on no order.

Models: equal architecture, vocabulary, tensor names and shapes, the base's too. The result has the base's files and
dtypes; arithmetic is in fp64 and rounded once, thresholds are exact. Integer tensors must be equal in all. Tensors are
streamed. Errors: MismatchError before any weight is read; ConfigError for weights or densities of another number;
CorruptError naming a tensor that holds a NaN or an infinity.

    lfm run reuse.breadcrumbs_ties base=base models=math models=code --set density=[0.8] --set gamma=[0.02] --out merged
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import lfm.core
from lfm.core import Inputs, Meta, Method, Model, Run
from lfm.fusing import Rule, fuse
from lfm.fusing.inputs import (
    BASE_AND_TUNED,
    Densities,
    Given,
    Normalize,
    Scale,
    Tensors,
    Weighting,
    agree,
    one_each,
    rebuilt,
    streamed,
    with_base,
)
from lfm.fusing.joins import agreed
from lfm.fusing.masks import between, middle

if TYPE_CHECKING:
    from lfm.core.model import LazyTensor


class Config(lfm.core.Config, frozen=True):
    density: Densities = (0.9,)
    gamma: Annotated[
        tuple[Annotated[float, Meta(ge=0, lt=1)], ...],
        Meta(description="fraction of each model's changes, the largest, that is dropped: one a model, or one for all"),
    ] = (0.01,)
    weights: Weighting = ()
    scale: Scale = 1.0
    normalize: Normalize = False


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    names, base, models = with_base(inputs)
    weights = one_each("weights", config.weights, len(models))
    density, gamma = (one_each(s, getattr(config, s), len(models)) for s in ("density", "gamma"))
    bounds = [
        run.step(f"bounds-{i}", lambda i=i: middle(names, base, models[i], lambda name: (density[i], gamma[i])))
        for i in run.track(range(len(models)), "thresholds", len(models))
    ]
    settings = {"weight": weights, "scale": config.scale, "divide": config.normalize, "cancelled": 0.0}

    def given(name: str) -> dict[str, Any]:
        return settings | {"low": [bound[name][0] for bound in bounds], "high": [bound[name][1] for bound in bounds]}

    return rebuilt(inputs, merged(names, base, models, given))


def merged(names: Sequence[str], base: Tensors, models: Sequence[Tensors], given: Given) -> dict[str, LazyTensor]:
    """given: a tensor's `low` and `high` (bounds of the magnitudes that are kept) and `weight`; agreed's others."""
    return fuse(Rule(agreed, first=between, given=given), names, models, base=base)


METHOD = Method(paper="arXiv:2312.06795", config=Config, models=BASE_AND_TUNED, run=run, cost=streamed(20), agree=agree)
