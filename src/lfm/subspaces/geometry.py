"""Where models lie to each other, from the inner products of their weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lfm.core.errors import CorruptError
from lfm.core.heavy import torch
from lfm.core.interfaces import Weights
from lfm.core.model import Model
from lfm.tensors.lazy import finite, parts
from lfm.tensors.match import floating, same

if TYPE_CHECKING:
    from torch import Tensor


def products(models: Sequence[Model]) -> Tensor:
    """(N, N) fp64 inner products of the models' weights less the first one's. Streams all models side by side.

    CorruptError where a model holds a NaN or an infinity.
    """
    stored = [model.ask(Weights).tensors() for model in models]
    names = floating(stored[0])
    same(stored[0].keys() - set(names), models)
    total = torch.zeros(len(models), len(models), dtype=torch.float64)
    for name in names:
        for read in parts([tensors[name] for tensors in stored]):
            values = torch.stack(read()).double()
            apart = values - values[:1]
            if not finite(apart):
                bad = next(model.ref for model, row in zip(models, values) if not finite(row))
                raise CorruptError(f"{bad}: {name!r} holds a NaN or an infinity", fix="leave out that model")
            total += apart @ apart.T
    return total


def distances(products: Tensor) -> Tensor:
    """(N, N) Euclidean distances of points from their inner products."""
    norms = products.diagonal()
    return (norms[:, None] + norms[None] - 2 * products).clamp(min=0).sqrt()


def within(products: Tensor, point: int, corners: Sequence[int]) -> tuple[Tensor, float]:
    """The mixture of the corners that is nearest to a point, as shares (n,) of them that sum to 1, and its distance.

    The minimum-norm point of a hull is a non-negative least-squares problem with one row more for the sum.
    """
    from scipy.optimize import nnls

    at = torch.tensor(list(corners))
    gram = products[at][:, at] - products[at, point][:, None] - products[at, point][None] + products[point, point]
    size = float(gram.diagonal().mean()) or 1.0
    values, vectors = torch.linalg.eigh(gram / size)
    root = (vectors * values.clamp(min=0).sqrt()).T
    found, _ = nnls(torch.cat([root, torch.ones(1, len(at), dtype=root.dtype)]).numpy(), [0.0] * len(at) + [1.0])
    shares = torch.tensor(found) / found.sum()
    return shares, float((shares @ gram @ shares).clamp(min=0).sqrt())
