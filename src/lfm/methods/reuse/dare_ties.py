"""Drop most of each fine-tuned model's changes at random, grow the rest, and merge those whose signs agree.

    τᵢ = mᵢ (θᵢ − θ_base) / d,    mᵢ ~ Bernoulli(d) for each entry
    γ  = sgn(Σᵢ wᵢ τᵢ)
    θ  = θ_base + λ Σᵢ wᵢ τᵢ [sgn wᵢτᵢ = γ]               (`density` is d, `scale` λ; with `normalize` by Σᵢ wᵢ[…])

Paper: DARE, arXiv 2311.03099, over TIES-Merging, arXiv 2306.01708, whose disjoint mean `normalize` is. mergekit's
dare_ties does not normalise by default, and grows what is left by the ratio of the l₁ norms before and after, whose
expectation is 1/d. Without `rescale` nothing is grown. Where the signed sum is 0, the base stays.

Which entries are dropped depends on the run's seed, the model's place, the tensor's name and the entry: neither threads
nor the model's size change it. Models: equal architecture, vocabulary, tensor names and shapes, the base's too. The
result has the base's files and dtypes; arithmetic is in fp64 and rounded once. Integer tensors must be equal in all.
Tensors are streamed. Errors: MismatchError before any weight is read; ConfigError for weights or densities of another
number; CorruptError naming a tensor that holds a NaN or an infinity.

    lfm run reuse.dare_ties base=base models=math models=code --set density=[0.1] --set weights=[0.5] --out merged
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import lfm.core
from lfm.core import Meta, Method, Run
from lfm.fusing import Rule, fuse
from lfm.fusing.inputs import (
    BASE_AND_TUNED,
    Cancelled,
    Densities,
    Normalize,
    Scale,
    Tensors,
    Weighting,
    agree,
    elected,
    streamed,
    thinned,
    whole,
)
from lfm.fusing.joins import agreed, dropped

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


class Config(lfm.core.Config, frozen=True):
    density: Densities = (0.1,)
    weights: Weighting = ()
    scale: Scale = 1.0
    rescale: Annotated[bool, Meta(description="divide what is kept by the density")] = True
    normalize: Normalize = True
    cancelled: Cancelled = "base"


def merge(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], configs: Callable[[str], Config], run: Run
) -> dict[str, LazyTensor]:
    def given(name: str) -> dict[str, Any]:
        return elected(configs(name), len(models)) | thinned(configs(name), len(models))

    return fuse(Rule(agreed, first=dropped, given=given, seed=run.seed), names, models, base=base)


METHOD = Method(
    paper="arXiv:2311.03099",
    config=Config,
    models=BASE_AND_TUNED,
    run=whole(merge),
    cost=streamed(30),
    agree=agree,
    merge=merge,
)
