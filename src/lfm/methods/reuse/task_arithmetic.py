"""Add fine-tuned models' changes to their base; a weight below zero takes a change away.

    θ = θ_base + λ Σᵢ wᵢ (θᵢ − θ_base)      (`scale` is λ; with `normalize` by Σᵢ wᵢ)

Paper: Editing models with task arithmetic, arXiv 2212.04089. Weights of −1 negate a task (forget it); (1, −1, 1) is an
analogy. λ = 0.4 is what the authors advise without data to choose it by.

Models: equal architecture, vocabulary, tensor names and shapes, the base's too. The result has the base's files and
dtypes; arithmetic is in fp64 and rounded once. Integer tensors must be equal in all. Tensors are streamed: memory does
not grow with the model. Errors: MismatchError before any weight is read; ConfigError for weights of another number;
CorruptError naming a tensor that holds a NaN or an infinity.

    lfm run reuse.task_arithmetic base=base models=math models=code --set weights=[1,-1] --out merged
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import lfm.core
from lfm.core import Inputs, Method, Model, Run
from lfm.fusing import Rule, fuse
from lfm.fusing.inputs import (
    BASE_AND_TUNED,
    Given,
    Normalize,
    Scale,
    Tensors,
    Weighting,
    agree,
    one_each,
    rebuilt,
    shared,
    streamed,
    with_base,
)
from lfm.fusing.joins import added, change

if TYPE_CHECKING:
    from lfm.core.model import LazyTensor


class Config(lfm.core.Config, frozen=True):
    weights: Weighting = ()
    scale: Scale = 0.4
    normalize: Normalize = False


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    names, base, models = with_base(inputs)
    weights = one_each("weights", config.weights, len(models))
    given = {"weight": weights, "scale": shared(weights, config.scale, config.normalize)}
    return rebuilt(inputs, merged(names, base, models, lambda name: given))


def merged(names: Sequence[str], base: Tensors, models: Sequence[Tensors], given: Given) -> dict[str, LazyTensor]:
    """given: a tensor's `weight` by model, and `scale`."""
    return fuse(Rule(added, first=change, given=given), names, models, base=base)


METHOD = Method(paper="arXiv:2212.04089", config=Config, models=BASE_AND_TUNED, run=run, cost=streamed(4), agree=agree)
