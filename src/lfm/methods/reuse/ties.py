"""Merge fine-tuned models without letting their changes cancel: trim, elect a sign, average those that agree.

    τᵢ = the fraction `density` of θᵢ − θ_base that is largest, else 0
    γ  = sgn(Σᵢ wᵢ τᵢ)                  elementwise: the larger total's sign
    τ  = Σᵢ wᵢ τᵢ [sgn τᵢ = γ] / Σᵢ wᵢ [sgn τᵢ = γ]
    θ  = θ_base + λ τ                                     (`scale` is λ)

Paper: TIES-Merging, arXiv 2306.01708. As in the paper, and unlike mergekit, the default trims over the whole model
(`scope` model; with `tensor` each tensor is trimmed by itself, as mergekit does), keeps 20 % and has λ = 1. Different
from the paper: the model weights wᵢ (all 1 there). Entries of equal magnitude at the threshold are all kept, so that
the result rests on no order. Where the signed totals cancel exactly, γ = 0 and the base stays; the authors' code takes
the sign that most of the model has, mergekit the positive one.

Models: equal architecture, vocabulary, tensor names and shapes, the base's too. The result has the base's files and
dtypes; arithmetic is in fp64 and rounded once, thresholds are exact. Integer tensors must be equal in all. Tensors are
streamed, twice for the thresholds and once for the result: memory does not grow with the model. Errors: MismatchError
before any weight is read; ConfigError for weights of another number; CorruptError naming a tensor that holds a NaN or
an infinity.

    lfm run reuse.ties base=base models=math models=code --set density=0.2 --out merged
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import lfm.core
from lfm.core import Cost, Inputs, Meta, Method, Model, Run, Sizes, Slot, Weights
from lfm.core.errors import ConfigError
from lfm.core.heavy import np
from lfm.fusing import Rule, fuse, kth_largest
from lfm.fusing.inputs import Tensors, memory, opened, together
from lfm.fusing.joins import agreed, change, magnitude
from lfm.tensors.lazy import size

if TYPE_CHECKING:
    from lfm.core.model import LazyTensor

Scope = Literal["model", "tensor"]


class Config(lfm.core.Config, frozen=True):
    density: Annotated[float, Meta(gt=0, le=1, description="fraction of each model's changes that is kept")] = 0.2
    scale: Annotated[float, Meta(ge=0, description="λ, how far to go from the base along the merged change")] = 1.0
    scope: Annotated[Scope, Meta(description="what the largest changes are chosen from: the model, or each tensor")] = (
        "model"
    )
    weights: Annotated[
        tuple[Annotated[float, Meta(ge=0)], ...], Meta(description="one a model, in their order; empty: all equal")
    ] = ()


def trimmed(base: float, x: float, limit: float) -> float:
    """τᵢ: a model's change where it is large enough, else 0."""
    change = x - base
    return change if abs(np.float32(change)) >= limit else 0.0


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    models = inputs.all("models")
    weights = _weights(config, len(models))
    names, (base, *sources) = opened((inputs.model("base"), *models))

    def trim(i: int) -> dict[str, float]:
        return limits(names, base, sources[i], lambda name: config.density, config.scope)

    found = [run.step(f"trim-{i}", lambda i=i: trim(i)) for i in run.track(range(len(models)), "trim", len(models))]
    settings = {"weight": weights, "scale": config.scale, "divide": 1.0, "cancelled": 0.0}
    made = merged(names, base, sources, lambda name: settings | {"limit": [limit[name] for limit in found]})
    return inputs.model("base").ask(Weights).replace(made)


def limits(
    names: Sequence[str], base: Tensors, model: Tensors, density: Callable[[str], float], scope: Scope
) -> dict[str, float]:
    """By name, the magnitude that a fraction of the changes reaches: of the tensor's own, or of all (one density)."""
    groups = [list(names)] if scope == "model" else [[name] for name in names]
    counts = [sum(size(base[name]) for name in group) for group in groups]
    keep = [max(1, int(density(group[0]) * count)) if group else 1 for group, count in zip(groups, counts)]
    asked = [[] if kept >= count else [kept] for kept, count in zip(keep, counts)]
    found = kth_largest(Rule(magnitude, first=change), groups, [model], asked, base=base)
    return {name: limit[0] if limit else 0.0 for group, limit in zip(groups, found) for name in group}


def merged(
    names: Sequence[str], base: Tensors, models: Sequence[Tensors], given: Callable[[str], Mapping[str, Any]]
) -> dict[str, LazyTensor]:
    """Trimmed changes, merged by sign. given: a tensor's `limit` and `weight` by model, and agreed's other numbers."""
    return fuse(Rule(agreed, first=trimmed, given=given), names, models, base=base)


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
        raise ConfigError("all weights are zero", fix="leave out the models that should not count")
    return weights


def cost(config: Config, sizes: Sizes) -> Cost:
    count, base = len(sizes.models["models"]), sizes.model("base")
    # two histogram passes and the merge, elementwise operations each
    return Cost(flops=30.0 * count * base.parameters, memory=memory(sizes), disk=base.bytes)


METHOD = Method(
    paper="arXiv:2306.01708",
    config=Config,
    models={
        "base": Slot((Weights,), help="what the models were fine-tuned from"),
        "models": Slot((Weights,), max=None, help="fine-tuned models to merge"),
    },
    run=run,
    cost=cost,
    agree=agree,
)
