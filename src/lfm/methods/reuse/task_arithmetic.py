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

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import lfm.core
from lfm.core import Method, Run
from lfm.fusing import Rule, fuse
from lfm.fusing.inputs import BASE_AND_TUNED, Normalize, Scale, Tensors, Weighting, agree, streamed, summed, whole
from lfm.fusing.joins import added, change

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


class Config(lfm.core.Config, frozen=True):
    weights: Weighting = ()
    scale: Scale = 0.4
    normalize: Normalize = False


def merge(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], configs: Callable[[str], Config], run: Run
) -> dict[str, LazyTensor]:
    return fuse(Rule(added, first=change, given=lambda n: summed(configs(n), len(models))), names, models, base=base)


METHOD = Method(
    paper="arXiv:2212.04089",
    config=Config,
    models=BASE_AND_TUNED,
    run=whole(merge),
    cost=streamed(4),
    agree=agree,
    merge=merge,
)
