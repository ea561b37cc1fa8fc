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
dtypes; arithmetic is in fp32, thresholds are exact. Integer tensors must be equal in all. Tensors are streamed, twice
for the thresholds and once for the result: memory does not grow with the model. Errors: MismatchError before any weight
is read; ConfigError for weights of another number; CorruptError naming a tensor that holds a NaN or an infinity.

    lfm run reuse.ties base=base models=math models=code --set density=0.2 --out merged
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import lfm.core
from lfm.core import Cost, Inputs, Meta, Method, Model, Run, Sizes, Slot, Weights
from lfm.core.errors import ConfigError
from lfm.core.heavy import torch
from lfm.tensors import match
from lfm.tensors.delta import change_thresholds
from lfm.tensors.lazy import CHUNK, map_tensors
from lfm.tensors.match import floating, same
from lfm.tensors.parallel import threads

if TYPE_CHECKING:
    from torch import Tensor

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


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    base, models = inputs.model("base"), inputs.all("models")
    weights = _weights(config, len(models))
    before = base.ask(Weights).tensors()
    names = floating(before)
    same(before.keys() - set(names), (base, *models))
    sources = [model.ask(Weights).tensors() for model in models]

    def trim(i: int) -> dict[str, float]:
        return change_thresholds(before, sources[i], names, config.density, config.scope)

    limits = [run.step(f"trim-{i}", lambda i=i: trim(i)) for i in run.track(range(len(models)), "trim", len(models))]

    def merge(name: str, start: Tensor, *values: Tensor) -> Tensor:
        changes = []
        for value, limit in zip(values, limits):
            change = value - start
            changes.append(change.masked_fill_(change.abs() < limit[name], 0.0))
        elected = torch.zeros_like(start)
        for change, weight in zip(changes, weights):
            elected.add_(change, alpha=weight)
        elected.sign_()
        total, mass = torch.zeros_like(start), torch.zeros_like(start)
        for change, weight in zip(changes, weights):
            agreed = (change.sign() == elected).to(start.dtype)
            total.addcmul_(change, agreed, value=weight)
            mass.add_(agreed, alpha=weight)
        mass.masked_fill_(mass == 0, 1.0)  # nothing agreed: the total is zero too
        return start + total.div_(mass).mul_(config.scale)

    return base.ask(Weights).replace(map_tensors(names, merge, [before, *sources]))


def agree(config: Config, inputs: Inputs) -> None:
    _weights(config, len(inputs.all("models")))
    match.agree([inputs.model("base"), *inputs.all("models")])


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
    return Cost(
        flops=30.0 * count * base.parameters,  # two histogram passes and the merge, elementwise operations each
        memory=threads() * (4 * count + 4) * 4 * CHUNK,
        disk=base.bytes,
    )


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
