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
from lfm.core import Cost, Inputs, Meta, Method, Model, Run, Sizes, Slot, Weights
from lfm.core.errors import ConfigError
from lfm.fusing import Each, Rule, fuse
from lfm.fusing.inputs import Tensors, memory, opened, together
from lfm.fusing.joins import weighted

if TYPE_CHECKING:
    from lfm.core.model import LazyTensor


class Config(lfm.core.Config, frozen=True):
    weights: Annotated[tuple[float, ...], Meta(description="one a model, in their order; empty: all equal")] = ()
    normalize: Annotated[bool, Meta(description="divide by the sum of the weights")] = True


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    models = inputs.all("models")
    weights = _weights(config, len(models))
    names, tensors = opened(models)
    used = [i for i, weight in enumerate(weights) if weight]
    made = merged(
        names, [tensors[i] for i in used], lambda name: tuple(weights[i] for i in used), tensors[0], config.normalize
    )
    return models[0].ask(Weights).replace(made)


def merged(
    names: Sequence[str],
    models: Sequence[Tensors],
    weights: Callable[[str], Each],
    like: Tensors | None = None,
    normalize: bool = True,
) -> dict[str, LazyTensor]:
    """The mean of each tensor, by its own weights; stored as `like`, or else the first model, has it."""

    def given(name: str) -> dict[str, Any]:
        weight = weights(name)
        return {"weight": [w / sum(weight) for w in weight] if normalize else weight}

    return fuse(Rule(weighted, given=given), names, models, like=like)


def agree(config: Config, inputs: Inputs) -> None:
    _weights(config, len(inputs.all("models")))
    together(inputs)


def _weights(config: Config, count: int) -> tuple[float, ...]:
    weights = config.weights or (1.0,) * count
    if len(weights) != count:
        raise ConfigError(
            f"weights has {len(weights)} values for {count} models", fix="give one a model, in their order"
        )
    if not any(weights):
        raise ConfigError("all weights are zero")
    if config.normalize and not sum(weights):
        raise ConfigError("the weights sum to zero", fix="set normalize=false to add and subtract models")
    return weights


def cost(config: Config, sizes: Sizes) -> Cost:
    models = sizes.models["models"]
    return Cost(flops=2.0 * len(models) * models[0].parameters, memory=memory(sizes), disk=models[0].bytes)


METHOD = Method(
    paper="arXiv:2203.05482",
    config=Config,
    models={"models": Slot((Weights,), min=2, max=None, help="models to average")},
    run=run,
    cost=cost,
    agree=agree,
)
