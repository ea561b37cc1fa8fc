"""A base and several models' changes from it, one matrix at a time; and what makes a set of vectors orthonormal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lfm.core.errors import CorruptError
from lfm.core.heavy import torch
from lfm.core.interfaces import Weights
from lfm.core.model import Model
from lfm.tensors.lazy import Whole, finite, widen
from lfm.tensors.match import floating, same

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import LazyTensor
    from lfm.core.method import Run


def changed(
    base: Model,
    models: Sequence[Model],
    matrix: Callable[[Tensor], Tensor],
    run: Run,
    *,
    scale: float,
    average: Sequence[str] = (),
) -> Model:
    """The base plus `scale` times a merged change: matrix((N, out, in)) → (out, in) of each 2-d tensor, else the mean.

    average: tensors whose names hold one of these texts are averaged too. Matrices are worked once each, as steps of
    the run: in memory are the result, as it is stored, and one matrix of all models in fp32. The rest is computed when
    it is read. CorruptError naming a tensor that holds a NaN or an infinity.
    """
    weights = base.ask(Weights)
    before = weights.tensors()
    names = floating(before)
    same(before.keys() - set(names), (base, *models))
    after = [model.ask(Weights).tensors() for model in models]

    def changes(name: str) -> tuple[Tensor, Tensor]:
        start = _checked(name, before[name], base)
        return start, torch.stack([_checked(name, found[name], m) - start for found, m in zip(after, models)])

    def worked(name: str) -> Tensor:
        start, moved = changes(name)
        with torch.no_grad():
            return (start + scale * matrix(moved)).to(before[name].dtype)

    def averaged(name: str) -> Tensor:
        start, moved = changes(name)
        return start + scale * moved.mean(0)

    def whole(name: str) -> bool:
        shape = before[name].shape
        return len(shape) == 2 and min(shape) > 1 and not any(part in name for part in average)

    made: dict[str, LazyTensor | Tensor] = {
        name: Whole(tuple(before[name].shape), before[name].dtype, lambda n=name: averaged(n))
        for name in names
        if not whole(name)
    }
    for name in run.track([name for name in names if whole(name)], "matrices"):
        made[name] = run.step(name, lambda n=name: worked(n))
    return weights.replace(made)


def _checked(name: str, tensor: LazyTensor, model: Model) -> Tensor:
    values = widen(tensor.read())
    if not finite(values):
        raise CorruptError(f"{model.ref}: {name!r} holds a NaN or an infinity", fix="mend or leave out that model")
    return values


def orthonormal(vectors: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (rows, where it is wide): U Vᵀ of its SVD (Procrustes)."""
    u, _, v = torch.linalg.svd(vectors, full_matrices=False)
    return u @ v
