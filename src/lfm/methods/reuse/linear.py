"""Average the weights of models that share an architecture.

    θ = Σᵢ wᵢ θᵢ / Σᵢ wᵢ      (without `normalize`: Σᵢ wᵢ θᵢ)

Paper: Model soups, arXiv 2203.05482 (the uniform soup, with weights); the merge that mergekit calls `linear`. A weight
of zero leaves its model out altogether: weights (1, 0) give the first model bit for bit.

Models: two or more with equal architecture, vocabulary, tensor names and shapes. The result has the first one's files
and dtypes; sums are in fp64 and rounded once. Integer tensors must be equal in all. Tensors are streamed: memory does
not grow with the model. Errors: MismatchError before any weight is read; ConfigError for weights of another number or
of sum zero; CorruptError naming a tensor that holds a NaN or an infinity.

    lfm run reuse.linear models=a models=b --set weights=[3,1] --out merged
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import lfm.core
from lfm.core import Cost, Inputs, Meta, Method, Run, Sizes, Slot, Weights
from lfm.core.errors import ConfigError
from lfm.fusing import Rule, fuse
from lfm.fusing import inputs as shared
from lfm.fusing.inputs import Tensors, Weighting, memory, normalized, one_each, whole
from lfm.fusing.joins import weighted

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


class Config(lfm.core.Config, frozen=True):
    weights: Weighting = ()
    normalize: Annotated[bool, Meta(description="divide by the sum of the weights")] = True


def merge(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], configs: Callable[[str], Config], run: Run
) -> dict[str, LazyTensor]:
    weights = {name: one_each("weights", configs(name).weights, len(models)) for name in names}
    used = [i for i in range(len(models)) if any(weight[i] for weight in weights.values())] or [0]

    def given(name: str) -> dict[str, Any]:
        weight = [weights[name][i] for i in used]
        return {"weight": normalized(weight, name) if configs(name).normalize else weight}

    for name in names:
        given(name)  # what is wrong with a weight is said before any tensor is read
    return fuse(Rule(weighted, given=given), names, [models[i] for i in used], like=models[0])


def agree(config: Config, inputs: Inputs) -> None:
    shared.agree(config, inputs)
    if config.weights and not any(config.weights):
        raise ConfigError("all weights are zero", fix="leave out the models that should not count")
    if config.normalize and config.weights and not sum(config.weights):
        raise ConfigError("the weights sum to zero", fix="set normalize=false to add and subtract models")


def cost(config: Config, sizes: Sizes) -> Cost:
    models = sizes.models["models"]
    flops = 2.0 * len(models) * models[0].parameters
    return Cost(flops=flops, memory=memory(sizes), disk=models[0].bytes, light=True)


METHOD = Method(
    paper="arXiv:2203.05482",
    config=Config,
    models={"models": Slot((Weights,), min=2, max=None, help="models to average")},
    run=whole(merge),
    cost=cost,
    agree=agree,
    merge=merge,
)
