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

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import lfm.core
from lfm.core import Inputs, Meta, Method, Model, Run
from lfm.fusing import Each, Rule, fuse
from lfm.fusing.inputs import BASE_AND_TUNED, Given, Tensors, agree, rebuilt, streamed, with_base
from lfm.fusing.joins import moved

if TYPE_CHECKING:
    from lfm.core.model import LazyTensor


class Config(lfm.core.Config, frozen=True):
    epsilon: Annotated[float, Meta(ge=0, description="changes of no more than this are none")] = 1e-5


def shared_out(base: float, x: Each, epsilon: float) -> float:
    total, count = 0.0, 0.0
    for i in range(len(x)):
        changed = abs(x[i] - base) > epsilon
        total += x[i] - base if changed else 0.0
        count += 1.0 if changed else 0.0
    return moved(base, total / max(count, 1.0))


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    names, base, models = with_base(inputs)
    return rebuilt(inputs, merged(names, base, models, lambda name: {"epsilon": config.epsilon}))


def merged(names: Sequence[str], base: Tensors, models: Sequence[Tensors], given: Given) -> dict[str, LazyTensor]:
    """given: a tensor's `epsilon`."""
    return fuse(Rule(shared_out, given=given), names, models, base=base)


METHOD = Method(paper="arXiv:2601.13572", config=Config, models=BASE_AND_TUNED, run=run, cost=streamed(6), agree=agree)
