"""Merge fine-tuned models: what several have changed is averaged, what one alone has is grown to make up for it.

    δᵢ = θᵢ − θ_base where it exceeds ε in magnitude, else 0;   c = how many δᵢ are not 0
    ρᵢ = #(entries that i shares) / #(entries of i alone),   λᵢ = 1 + r min(ρᵢ, α)       for each tensor
    θ  = θ_base + Σᵢ δᵢ (λᵢ if c = 1 else 1/c)

Paper: Reinforced Agent Merging (RAM+), arXiv 2601.13572; mergekit's ramplus_tl, whose ratios are each tensor's own.

Models: equal architecture, vocabulary, tensor names and shapes, the base's too. The result has the base's files and
dtypes; arithmetic is in fp64 and rounded once. Integer tensors must be equal in all. Tensors are streamed. Errors:
MismatchError before any weight is read; CorruptError naming a tensor that holds a NaN or an infinity.

    lfm run reuse.ramplus_tl base=base models=math models=code --out merged
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import lfm.core
from lfm.core import Meta, Method, Run
from lfm.core.heavy import np
from lfm.fusing import Each, Rule, fuse, sums
from lfm.fusing.inputs import BASE_AND_TUNED, Tensors, agree, streamed, whole
from lfm.fusing.joins import moved

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


class Config(lfm.core.Config, frozen=True):
    epsilon: Annotated[float, Meta(ge=0, description="changes of no more than this are none")] = 1e-5
    r: Annotated[float, Meta(ge=0, description="how much a model's own changes grow with its ratio ρ")] = 0.1
    alpha: Annotated[float, Meta(ge=0, description="the largest ρ that counts")] = 0.2


def count_of(base: float, x: Each, epsilon: float) -> float:
    count = 0.0
    for i in range(len(x)):
        count += 1.0 if abs(x[i] - base) > epsilon else 0.0
    return count


def tallied(model: int, alone: int, base: float, x: Each, epsilon: float) -> float:
    """1 where the model has a change that it shares, or with `alone` has alone."""
    mine = abs(x[model] - base) > epsilon
    only = count_of(base, x, epsilon) == 1.0
    return 1.0 if mine and only == (alone == 1) else 0.0


def grown(base: float, x: Each, epsilon: float, grow: Each) -> float:
    total = 0.0
    count = count_of(base, x, epsilon)
    for i in range(len(x)):
        part = x[i] - base if abs(x[i] - base) > epsilon else 0.0
        total += part * grow[i] if count == 1.0 else part / max(count, 1.0)
    return moved(base, total)


def merge(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], configs: Callable[[str], Config], run: Run
) -> dict[str, LazyTensor]:
    assert base is not None
    which = [(i, alone) for i in range(len(models)) for alone in (0, 1)]
    counts = sums(Rule(tallied, given=lambda n: {"epsilon": configs(n).epsilon}), names, models, which, base=base)

    def found(name: str) -> dict[str, Any]:
        config, (several, one) = configs(name), counts[name][0].reshape(-1, 2).T
        ratio = several / np.maximum(one, config.epsilon or 1e-300)
        return {"epsilon": config.epsilon, "grow": 1 + config.r * np.minimum(ratio, config.alpha)}

    return fuse(Rule(grown, given=found), names, models, base=base)


METHOD = Method(
    paper="arXiv:2601.13572",
    config=Config,
    models=BASE_AND_TUNED,
    run=whole(merge),
    cost=streamed(14),
    agree=agree,
    merge=merge,
)
