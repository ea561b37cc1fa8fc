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

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import lfm.core
from lfm.core import Meta, Method, Run
from lfm.fusing import Rule, fuse
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
    elected,
    streamed,
    whole,
)
from lfm.fusing.joins import agreed
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
    cancelled: Cancelled = "base"


def merge(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], configs: Callable[[str], Config], run: Run
) -> dict[str, LazyTensor]:
    assert base is not None
    kept = middles(names, base, models, configs, run)
    return fuse(
        Rule(agreed, first=between, given=lambda n: elected(configs(n), len(models)) | kept(n)),
        names,
        models,
        base=base,
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
