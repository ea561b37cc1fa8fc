"""A base and several models' changes from it, one matrix at a time; and what makes a set of vectors orthonormal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lfm.core.errors import CorruptError
from lfm.core.heavy import torch
from lfm.core.model import Model, Weights
from lfm.tensors.lazy import Whole, finite, widen
from lfm.tensors.match import floating, same

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.model import LazyTensor


def changed(
    base: Model,
    models: Sequence[Model],
    matrix: Callable[[Tensor], Tensor],
    *,
    scale: float,
    average: Sequence[str] = (),
) -> Model:
    """The base plus `scale` times a merged change: matrix((N, out, in)) → (out, in) of each 2-d tensor, else the mean.

    average: tensors whose names hold one of these texts are averaged too. One tensor of all models is in memory at a
    time, in fp32. CorruptError, when the result is read, naming a tensor that holds a NaN or an infinity.
    """
    weights = base.ask(Weights)
    before = weights.tensors()
    names = floating(before)
    same(before.keys() - set(names), (base, *models))
    after = [model.ask(Weights).tensors() for model in models]

    def merged(name: str) -> Tensor:
        start = _checked(name, before[name], base)
        changes = torch.stack([_checked(name, found[name], m) - start for found, m in zip(after, models)])
        whole = changes.ndim == 3 and min(changes.shape[1:]) > 1 and not any(part in name for part in average)
        with torch.no_grad():
            return start + scale * (matrix(changes) if whole else changes.mean(0))

    return weights.replace(
        {name: Whole(tuple(before[name].shape), before[name].dtype, lambda n=name: merged(n)) for name in names}
    )


def _checked(name: str, tensor: LazyTensor, model: Model) -> Tensor:
    values = widen(tensor.read())
    if not finite(values):
        raise CorruptError(f"{model.ref}: {name!r} holds a NaN or an infinity", fix="mend or leave out that model")
    return values


def orthonormal(vectors: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (rows, where it is wide): U Vᵀ of its SVD (Procrustes)."""
    u, _, v = torch.linalg.svd(vectors, full_matrices=False)
    return u @ v
