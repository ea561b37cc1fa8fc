"""Merge fine-tuned models: what one model alone has changed is kept whole, what several have is averaged.

    δᵢ = θᵢ − θ_base where it exceeds ε in magnitude, else 0;   c = how many δᵢ are not 0
    θ  = θ_base + Σᵢ δᵢ / max(c, 1)

Paper: Reinforced Agent Merging, arXiv 2601.13572; mergekit's ram.

Models: equal architecture, vocabulary, tensor names and shapes, the base's too. The result has the base's files and
dtypes; arithmetic is in fp64 and rounded once. Integer tensors must be equal in all. Tensors are streamed. Errors:
MismatchError before any weight is read; CorruptError naming a tensor that holds a NaN or an infinity.

    lfm run reuse.ram base=base models=math models=code --out merged
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import lfm.core
from lfm.core import Meta, Method, Run
from lfm.fusing import Each, Rule, fuse
from lfm.fusing.inputs import BASE_AND_TUNED, Tensors, agree, streamed, whole
from lfm.fusing.joins import moved

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


class Config(lfm.core.Config, frozen=True):
    epsilon: Annotated[float, Meta(ge=0, description="changes of no more than this are none")] = 1e-5


def shared_out(base: float, x: Each, epsilon: float) -> float:
    total, count = 0.0, 0.0
    for i in range(len(x)):
        changed = abs(x[i] - base) > epsilon
        total += x[i] - base if changed else 0.0
        count += 1.0 if changed else 0.0
    return moved(base, total / max(count, 1.0))


def merge(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], configs: Callable[[str], Config], run: Run
) -> dict[str, LazyTensor]:
    assert base is not None
    return fuse(Rule(shared_out, given=lambda name: {"epsilon": configs(name).epsilon}), names, models, base=base)


METHOD = Method(
    paper="arXiv:2601.13572",
    config=Config,
    models=BASE_AND_TUNED,
    run=whole(merge),
    cost=streamed(6),
    agree=agree,
    merge=merge,
)
