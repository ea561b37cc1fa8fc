"""Merge fine-tuned models by the middle of their changes: neither the largest, which are outliers, nor the smallest.

    τᵢ = θᵢ − θ_base where its magnitude is among the fraction d after the largest γ of the tensor's, else 0
    θ  = θ_base + λ Σᵢ wᵢ τᵢ               (`density` is d, `gamma` γ, `scale` λ; with `normalize` by Σᵢ wᵢ)

Paper: Model Breadcrumbs, arXiv 2312.06795: masks of each tensor. As in mergekit, where γ and d leave nothing over at
the small end (γ + d > 1), fewer large ones are dropped, so that d are kept; d = 1 keeps all. Entries of equal magnitude
at either threshold go the same way, so that the result rests on no order.

Models: equal architecture, vocabulary, tensor names and shapes, the base's too. The result has the base's files and
dtypes; arithmetic is in fp64 and rounded once, thresholds are exact. Integer tensors must be equal in all. Tensors are
streamed. Errors: MismatchError before any weight is read; ConfigError for weights or densities of another number;
CorruptError naming a tensor that holds a NaN or an infinity.

    lfm run reuse.breadcrumbs base=base models=math models=code --set density=[0.8] --set gamma=[0.02] --out merged
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import lfm.core
from lfm.core import Meta, Method, Run
from lfm.fusing import Rule, fuse
from lfm.fusing.inputs import (
    BASE_AND_TUNED,
    Densities,
    Normalize,
    Regrow,
    Scale,
    Tensors,
    Weighting,
    agree,
    streamed,
    summed,
    whole,
)
from lfm.fusing.joins import added
from lfm.fusing.masks import between, middles

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


class Config(lfm.core.Config, frozen=True):
    density: Densities = (0.9,)
    gamma: Annotated[
        tuple[Annotated[float, Meta(ge=0, lt=1)], ...],
        Meta(description="fraction of each model's changes, the largest, that is dropped: one a model, or one for all"),
    ] = (0.01,)
    weights: Weighting = ()
    scale: Scale = 1.0
    rescale: Regrow = False
    normalize: Normalize = False


def merge(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], configs: Callable[[str], Config], run: Run
) -> dict[str, LazyTensor]:
    assert base is not None
    kept = middles(names, base, models, configs, run)
    return fuse(
        Rule(added, first=between, given=lambda n: summed(configs(n), len(models)) | kept(n)), names, models, base=base
    )


METHOD = Method(
    paper="arXiv:2312.06795",
    config=Config,
    models=BASE_AND_TUNED,
    run=whole(merge),
    cost=streamed(20),
    agree=agree,
    merge=merge,
)
