"""Merge the leading singular vectors of each model's change, turned until they no longer interfere.

    τᵢ ≈ Uᵢ Σᵢ Vᵢᵀ, the first r/N of each;   Δ = U⊥ Σ V⊥ᵀ,  U⊥, V⊥ the nearest orthonormal to [U₁ … U_N], [V₁ … V_N]

Paper: Task Singular Vectors (TSV-Merge), arXiv 2412.00081; for each matrix, τᵢ = θᵢ − θ₀, r its smaller side. Whatever
is no matrix is averaged; so is a tensor whose name holds one of `average`. Different from the authors' code where
changes are of lower rank than what is kept of them: directions without change are left out, since turning them would
turn the others; and where a matrix has fewer directions than there are models: each then keeps its first, not none.

Models: base and models with equal architecture, vocabulary, tensor names and shapes. The result has the base's files
and dtypes; arithmetic is in fp32, one matrix of all models at a time, each once and kept. Errors: MismatchError before
any weight is read; CorruptError naming a tensor that holds a NaN or an infinity.

    lfm run reuse.tsv base=base models=math models=code --out merged
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import lfm.core
from lfm.core import Cost, Inputs, Meta, Method, Model, Run, Sizes, Slot, Weights
from lfm.core.heavy import torch
from lfm.subspaces.matrices import changed, orthonormal
from lfm.tensors import match

if TYPE_CHECKING:
    from torch import Tensor


ZERO = 1e-6
"""Directions of less than this share of the largest singular value are rounding."""


class Config(lfm.core.Config, frozen=True):
    share: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        Meta(description="of a matrix's directions that each model keeps; null: 1 over the number of models"),
    ] = None
    scale: Annotated[float, Meta(ge=0, description="how far to go from the base along the merged change")] = 1.0
    average: Annotated[tuple[str, ...], Meta(description="parts of names of tensors to average")] = ()


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    merge = partial(merged, share=config.share)
    return changed(inputs.model("base"), inputs.all("models"), merge, run, scale=config.scale, average=config.average)


def merged(changes: Tensor, share: float | None = None) -> Tensor:
    """(N, out, in) → (out, in)."""
    rank = min(changes.shape[1:])
    kept = max(1, int(rank / len(changes) if share is None else rank * share))
    u, s, v = torch.linalg.svd(changes, full_matrices=False)
    told = [int((found[:kept] > ZERO * s.max()).sum()) for found in s]
    u = torch.cat([found[:, :count] for found, count in zip(u, told)], 1)
    v = torch.cat([found[:count] for found, count in zip(v, told)])
    sizes = torch.cat([found[:count] for found, count in zip(s, told)])
    return (orthonormal(u) * sizes) @ orthonormal(v) if len(sizes) else torch.zeros_like(changes[0])


def agree(config: Config, inputs: Inputs) -> None:
    match.agree([inputs.model("base"), *inputs.all("models")])


def cost(config: Config, sizes: Sizes) -> Cost:
    count, base = len(sizes.models["models"]), sizes.model("base")
    side = base.width or 1024
    return Cost(
        flops=20.0 * (count + 2) * side * base.parameters,
        memory=4 * (5 * count + 8) * side * 4 * side + base.bytes,
        disk=base.bytes,
    )


METHOD = Method(
    paper="arXiv:2412.00081",
    config=Config,
    models={
        "base": Slot((Weights,), help="what the models were fine-tuned from"),
        "models": Slot((Weights,), max=None, help="fine-tuned models to merge"),
    },
    run=run,
    cost=cost,
    agree=agree,
)
