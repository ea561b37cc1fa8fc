"""Move each weight of a base towards another model's, the more so the nearer the two are.

    w = min(1, t / max(|θ₁ − θ₀|, 10⁻⁶)),    θ = w θ₁ + (1 − w) θ₀          elementwise, θ₀ the base

Source: mergekit's nearswap (no paper): weights that differ by no more than t are swapped, others move by t.

Models: equal architecture, vocabulary, tensor names and shapes, the base's too. The result has the base's files and
dtypes; arithmetic is in fp64 and rounded once. Integer tensors must be equal in all. Tensors are streamed: memory does
not grow with the model. Errors: MismatchError before any weight is read; CorruptError naming a tensor that holds a NaN
or an infinity.

    lfm run reuse.nearswap base=a models=b --set t=0.001 --out merged
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import lfm.core
from lfm.core import Meta, Method, Run, Slot, Weights
from lfm.fusing import Each, Rule, fuse
from lfm.fusing.inputs import BASE, Tensors, agree, streamed, whole

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


class Config(lfm.core.Config, frozen=True):
    t: Annotated[float, Meta(ge=0, description="how far a weight may move; nearer ones are swapped")] = 0.001


def swapped(base: float, x: Each, t: float) -> float:
    apart = abs(base - x[0])
    weight = min(1.0, t / max(apart, 1e-6))
    return weight * x[0] + (1.0 - weight) * base


def merge(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], configs: Callable[[str], Config], run: Run
) -> dict[str, LazyTensor]:
    assert base is not None
    return fuse(Rule(swapped, given=lambda name: {"t": configs(name).t}), names, models, base=base)


METHOD = Method(
    paper="mergekit",
    config=Config,
    models={"base": BASE, "models": Slot((Weights,), help="the model to move towards")},
    run=whole(merge),
    cost=streamed(8),
    agree=agree,
    merge=merge,
)
