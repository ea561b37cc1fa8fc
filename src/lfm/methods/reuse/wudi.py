"""Merge changes so that, on the inputs each model's change speaks of, the others' stay silent.

    min_τ Σᵢ ‖(τ − τᵢ) τᵢᵀ‖² / ‖τᵢ‖²,    τᵢ = θᵢ − θ₀, for each matrix (out, in)

Paper: WUDI-Merging, arXiv 2503.08099: a change's rows span the inputs it was learned on, so that no data are needed.
Differs: of all minima the nearest to Σᵢ τᵢ is computed (RegMean with τᵢᵀτᵢ for Grams), where the paper walks towards it
with `steps` of Adam (solver=adam). How far those get depends on the size of the changes, for Adam's steps have the
weights' units: on the zoo's eight experts the paper's rate ends at .440, ten times it at .827, the minimum at .837.
Whatever is no matrix is averaged; so is a tensor whose name holds one of `average`.

Models: base and models with equal architecture, vocabulary, tensor names and shapes. The result has the base's files
and dtypes; arithmetic is in fp32 (exact: fp64), one matrix of all models at a time, each once and kept. Weights are
taken as (out, in), which all but GPT-2's kind of layers are. Errors: MismatchError before any weight is read;
CorruptError naming a tensor that holds a NaN or an infinity.

    lfm run reuse.wudi base=base models=math models=code --out merged
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import lfm.core
from lfm.core import Cost, Inputs, Meta, Method, Model, Run, Sizes, Slot, Weights
from lfm.core.heavy import torch
from lfm.subspaces.matrices import changed
from lfm.tensors import match

if TYPE_CHECKING:
    from torch import Tensor

CUT = 1e-6
"""Directions of less than this share of H's largest eigenvalue are taken for ones that no model moved in."""


class Config(lfm.core.Config, frozen=True):
    solver: Annotated[Literal["exact", "adam"], Meta(description="the minimum, or the paper's steps towards it")] = (
        "exact"
    )
    steps: Annotated[int, Meta(ge=0, description="adam: steps")] = 300
    lr: Annotated[float, Meta(gt=0, description="adam: learning rate, in units of the weights")] = 1e-5
    scale: Annotated[float, Meta(ge=0, description="how far to go from the base along the merged change")] = 1.0
    average: Annotated[tuple[str, ...], Meta(description="parts of names of tensors to average")] = ()


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    merge = exact if config.solver == "exact" else partial(descended, steps=config.steps, lr=config.lr)
    return changed(inputs.model("base"), inputs.all("models"), merge, run, scale=config.scale, average=config.average)


def moments(changes: Tensor) -> tuple[Tensor, Tensor]:
    """H (in, in) and A (out, in) of changes (N, out, in): the interference's gradient at τ is 2(τH − A)."""
    norms = changes.square().sum((1, 2)).clamp(min=1e-30)
    grams = changes.mT @ changes / norms[:, None, None]
    return grams.sum(0), (changes @ grams).sum(0)


def descended(changes: Tensor, steps: int, lr: float) -> Tensor:
    """Adam from the sum of the changes."""
    h, a = moments(changes)
    merged = changes.sum(0).requires_grad_()
    optimizer = torch.optim.Adam([merged], lr=lr)
    for _ in range(steps):
        merged.grad = 2 * (merged.detach() @ h - a)
        optimizer.step()
    return merged.detach()


def exact(changes: Tensor) -> Tensor:
    """The minimum nearest to the sum of the changes."""
    h, a = moments(changes.double())
    start = changes.double().sum(0)
    return (start + (a - start @ h) @ torch.linalg.pinv(h, hermitian=True, rtol=CUT)).float()


def agree(config: Config, inputs: Inputs) -> None:
    match.agree([inputs.model("base"), *inputs.all("models")])


def cost(config: Config, sizes: Sizes) -> Cost:
    count, base = len(sizes.models["models"]), sizes.model("base")
    side = base.width or 1024
    times = 4 * count + (2 * config.steps if config.solver == "adam" else 30)
    return Cost(
        flops=float(times) * side * base.parameters,
        memory=4 * (2 * count + 8) * side * 4 * side + base.bytes,
        disk=base.bytes,
    )


METHOD = Method(
    paper="arXiv:2503.08099",
    config=Config,
    models={
        "base": Slot((Weights,), help="what the models were fine-tuned from"),
        "models": Slot((Weights,), max=None, help="fine-tuned models to merge"),
    },
    run=run,
    cost=cost,
    agree=agree,
)
