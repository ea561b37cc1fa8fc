"""Average the weights of models that share an architecture.

    θ = Σᵢ wᵢ θᵢ / Σᵢ wᵢ      (without `normalize`: Σᵢ wᵢ θᵢ)

Paper: Model soups, arXiv 2203.05482 (the uniform soup, with weights); the merge that mergekit calls `linear`. A weight
of zero leaves its model out altogether: weights (1, 0) give the first model bit for bit.

Models: two or more with equal architecture, vocabulary, tensor names and shapes. The result has the first one's files
and dtypes; sums are in fp32. Integer tensors must be equal in all. Tensors are streamed: memory does not grow with
the model. Errors: MismatchError before any weight is read; ConfigError for weights of another number or of sum zero;
CorruptError naming a tensor that holds a NaN or an infinity.

    lfm run reuse.linear models=a models=b --set weights=[3,1] --out merged
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import lfm.core
from lfm.core import Cost, Inputs, Meta, Method, Model, Run, Sizes, Slot, Weights
from lfm.core.errors import ConfigError
from lfm.tensors import match
from lfm.tensors.lazy import CHUNK, map_tensors
from lfm.tensors.match import floating, same
from lfm.tensors.parallel import threads

if TYPE_CHECKING:
    from torch import Tensor


class Config(lfm.core.Config, frozen=True):
    weights: Annotated[tuple[float, ...], Meta(description="one a model, in their order; empty: all equal")] = ()
    normalize: Annotated[bool, Meta(description="divide by the sum of the weights")] = True


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    models = inputs.all("models")
    weights = _weights(config, len(models))
    sources = [model.ask(Weights).tensors() for model, weight in zip(models, weights) if weight]
    used = [weight for weight in weights if weight]

    def mean(name: str, *values: Tensor) -> Tensor:
        total = values[0] * used[0]
        for value, weight in zip(values[1:], used[1:]):
            total.add_(value, alpha=weight)
        return total

    first = models[0].ask(Weights)
    names = floating(first.tensors())
    same(first.tensors().keys() - set(names), models)
    return first.replace(map_tensors(names, mean, sources, like=first.tensors()))


def agree(config: Config, inputs: Inputs) -> None:
    models = inputs.all("models")
    _weights(config, len(models))
    match.agree(models)


def _weights(config: Config, count: int) -> list[float]:
    weights = list(config.weights) or [1.0] * count
    if len(weights) != count:
        raise ConfigError(
            f"weights has {len(weights)} values for {count} models", fix="give one a model, in their order"
        )
    if not any(weights):
        raise ConfigError("all weights are zero")
    if not config.normalize:
        return weights
    total = sum(weights)
    if not total:
        raise ConfigError("the weights sum to zero", fix="set normalize=false to add and subtract models")
    return [weight / total for weight in weights]


def cost(config: Config, sizes: Sizes) -> Cost:
    models = sizes.models["models"]
    return Cost(
        flops=2.0 * len(models) * models[0].parameters,
        memory=threads() * (len(models) + 3) * 4 * CHUNK,
        disk=models[0].bytes,
    )


METHOD = Method(
    paper="arXiv:2203.05482",
    config=Config,
    models={"models": Slot((Weights,), min=2, max=None, help="models to average")},
    run=run,
    cost=cost,
    agree=agree,
)
