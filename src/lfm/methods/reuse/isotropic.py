"""Merge changes with a flat spectrum: no direction that one model needs is drowned by those that many share.

    common   Δ = σ̄ U Vᵀ,   U Σ Vᵀ = Σᵢ τᵢ,   σ̄ = mean Σ                (Iso-C; for each matrix, τᵢ = θᵢ − θ₀)
    task     U, V: the first k of these, and of each (1 − U_k U_kᵀ) τᵢ the first (r − k)/N, made orthonormal; σ̄ is the
             mean of all their singular values                           (Iso-CTS)

Paper: No task left behind, arXiv 2502.04959. k is `common` of the smaller side r, less what does not divide by N.
Whatever is no matrix is averaged; so is a tensor whose name holds one of `average` (the authors leave text_projection
out). `scale` is tuned on validation data in the paper. On the zoo's eight experts `common` does better than `task`.

Models: base and models with equal architecture, vocabulary, tensor names and shapes. The result has the base's files
and dtypes; arithmetic is in fp32, one matrix of all models at a time, each once and kept. The spectrum is made flat in
every direction, those that no model moved in too: of changes of low rank these are the solver's to choose. Errors:
MismatchError before any weight is read; CorruptError naming a tensor that holds a NaN or an infinity.

    lfm run reuse.isotropic base=base models=math models=code --set subspaces=common --out merged
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import lfm.core
from lfm.core import Cost, Inputs, Meta, Method, Model, Run, Sizes, Slot, Weights
from lfm.core.heavy import torch
from lfm.subspaces.matrices import changed, orthonormal
from lfm.tensors import match

if TYPE_CHECKING:
    from torch import Tensor


class Config(lfm.core.Config, frozen=True):
    subspaces: Annotated[
        Literal["common", "task"], Meta(description="of the summed changes, or with each model's own besides")
    ] = "task"
    common: Annotated[float, Meta(ge=0, le=1, description="task: share of the directions that are common")] = 0.8
    scale: Annotated[float, Meta(ge=0, description="how far to go from the base along the merged change")] = 1.0
    average: Annotated[tuple[str, ...], Meta(description="parts of names of tensors to average")] = ()


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    merge = common if config.subspaces == "common" else partial(task, share=config.common)
    return changed(inputs.model("base"), inputs.all("models"), merge, run, scale=config.scale, average=config.average)


def common(changes: Tensor) -> Tensor:
    """(N, out, in) → (out, in), Iso-C."""
    u, s, v = torch.linalg.svd(changes.sum(0), full_matrices=False)
    return s.mean() * (u @ v)


def task(changes: Tensor, share: float) -> Tensor:
    """(N, out, in) → (out, in), Iso-CTS."""
    count, rank = len(changes), min(changes.shape[1:])
    own = min(round((rank - int(rank * share)) / count), rank // count)
    kept = rank - own * count
    u, s, v = torch.linalg.svd(changes.sum(0), full_matrices=False)
    u, s, v = u[:, :kept], s[:kept], v[:kept]
    rest = torch.linalg.svd(changes - u @ (u.T @ changes), full_matrices=False) if own else None
    if rest is not None:
        u = torch.cat([*rest[0][:, :, :own], u], 1)
        s = torch.cat([*rest[1][:, :own], s])
        v = torch.cat([*rest[2][:, :own], v])
    return s.mean() * (orthonormal(u) @ orthonormal(v))


def agree(config: Config, inputs: Inputs) -> None:
    match.agree([inputs.model("base"), *inputs.all("models")])


def cost(config: Config, sizes: Sizes) -> Cost:
    count, base = len(sizes.models["models"]), sizes.model("base")
    times = 1 if config.subspaces == "common" else count + 3
    side = base.width or 1024
    return Cost(
        flops=20.0 * times * side * base.parameters,
        memory=4 * (5 * count + 8) * side * 4 * side + base.bytes,
        disk=base.bytes,
    )


METHOD = Method(
    paper="arXiv:2502.04959",
    config=Config,
    models={
        "base": Slot((Weights,), help="what the models were fine-tuned from"),
        "models": Slot((Weights,), max=None, help="fine-tuned models to merge"),
    },
    run=run,
    cost=cost,
    agree=agree,
)
