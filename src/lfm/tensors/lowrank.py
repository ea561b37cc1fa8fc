"""Changes of low rank: added to a weight as it is read, joined exactly, and cut to a rank or an energy."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, NamedTuple, final

from lfm.core.errors import CorruptError
from lfm.core.heavy import torch
from lfm.core.interfaces import LowRank
from lfm.tensors.lazy import CHUNK, code_of, finite, is_chunked

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import LazyTensor

OVERSAMPLED = 16
"""Directions beyond those asked for, that a randomised decomposition begins with."""


def delta(change: LowRank) -> Tensor:
    """BA as the weight is stored, in fp64."""
    made = change.b.double() @ change.a.double()
    return (made.T if change.transposed else made).reshape(shape_of(change))


def shape_of(change: LowRank) -> tuple[int, ...]:
    """The shape of the weight that it changes."""
    out, wide = change.b.shape[0], change.a.shape[1]
    if change.transposed:
        return (wide, out)
    return (out, wide // prod(change.kernel), *change.kernel) if change.kernel else (out, wide)


@final
@dataclass(frozen=True)
class Plus:
    """W + BA, summed in fp64 and rounded once to W's dtype, by blocks of rows that do not depend on what is asked for.

    CorruptError where the sum is not finite.
    """

    name: str
    weight: LazyTensor
    change: LowRank
    _kept: threading.local = field(default_factory=threading.local, compare=False, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def code(self) -> str:
        return code_of(self.weight)

    def read(self) -> Tensor:
        return self.read_flat(0, prod(self.shape)).reshape(self.shape)

    def read_flat(self, start: int, stop: int) -> Tensor:
        wide = max(1, prod(self.shape[1:]))
        rows = max(1, CHUNK // wide)
        out = torch.empty(stop - start, dtype=self.dtype)
        for block in range(start // (rows * wide), -(-stop // (rows * wide))):
            first = block * rows * wide
            made = self._block(block * rows, min((block + 1) * rows, self.shape[0])).reshape(-1)
            low, high = max(start, first), min(stop, first + made.numel())
            out[low - start : high - start] = made[low - first : high - first]
        return out

    def read_into(self, buffer: memoryview, offset: int = 0) -> None:
        size = self.dtype.itemsize
        values = self.read_flat(offset // size, (offset + len(buffer)) // size)
        buffer[:] = values.contiguous().view(torch.uint8).numpy().data

    def _block(self, first: int, last: int) -> Tensor:
        """Rows first to last; this thread's last block is kept, for its parts are asked for in turn."""
        if getattr(self._kept, "rows", None) != (first, last):
            wide = max(1, prod(self.shape[1:]))
            if is_chunked(self.weight):
                before = self.weight.read_flat(first * wide, last * wide).reshape(last - first, wide)
            else:
                before = self.weight.read().reshape(-1, wide)[first:last]
            b, a = self.change.b, self.change.a
            if self.change.transposed:
                added = a[:, first:last].T.double() @ b.T.double()
            else:
                added = b[first:last].double() @ a.double()
            made = added.add_(before.double()).to(self.dtype)
            if not finite(made):
                where = getattr(self.weight, "file", "its base")
                raise CorruptError(
                    f"{self.name!r} is not finite once its adapter's change is added",
                    why=f"{where}, or the adapter, holds a NaN or an infinity there, or the sum leaves {self.dtype}",
                )
            self._kept.rows, self._kept.made = (first, last), made
        return self._kept.made


def joined(changes: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ wᵢ BᵢAᵢ, exactly: factors side by side, rank Σ rᵢ, fp64."""
    b = torch.cat([weight * change.b.double() for weight, change in zip(weights, changes, strict=True)], dim=1)
    a = torch.cat([change.a.double() for change in changes])
    return changes[0]._replace(b=b, a=a)


class Cut(NamedTuple):
    """The best approximation of a change. energy: ‖ΔW‖²_F; kept: what it keeps of it."""

    change: LowRank
    kept: float
    energy: float


def cut(change: LowRank, rank: int = 0, energy: float = 0.0) -> Cut:
    """The nearest change of at most `rank`, or of the least rank that keeps the fraction `energy` of ‖BA‖²_F.

    QR of both factors and an SVD of the core between them: O((out + in) r²), and never a matrix (out, in). Rank 0 and
    energy 0: the numerical rank.
    """
    qb, rb = torch.linalg.qr(change.b.double())
    qa, ra = torch.linalg.qr(change.a.double().T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    total = float(s.square().sum())
    keep = kept_rank(s, rank, energy, total)
    made = _factors(change, qb @ u[:, :keep], s[:keep], vh[:keep] @ qa.T)
    return Cut(made, float(s[:keep].square().sum()), total)


def factored(
    matrix: Tensor, like: LowRank, rank: int, energy: float, iterations: int, generator: torch.Generator
) -> Cut:
    """The best change of a (out, in) matrix, in fp64.

    iterations: power iterations of a randomised decomposition; with 0, or where it would save nothing, the whole SVD.

    Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1. With an energy, directions are doubled until
    those found keep it. `like` gives the layer's kind.
    """
    matrix = matrix.double()
    total, short = float(matrix.square().sum()), min(matrix.shape)
    wanted = rank or (16 if energy else short)
    while iterations and wanted + OVERSAMPLED < short // 4:
        u, s, vh = _randomised(matrix, wanted + OVERSAMPLED, iterations, generator)
        if rank or float(s[:wanted].square().sum()) >= energy * total:
            break
        wanted *= 2
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    keep = kept_rank(s, rank, energy, total)
    return Cut(_factors(like, u[:, :keep], s[:keep], vh[:keep]), float(s[:keep].square().sum()), total)


def kept_rank(values: Tensor, rank: int, energy: float, total: float) -> int:
    """How many singular values to keep: of those above rounding `rank` at most, and no more than `energy` takes."""
    keep = int((values > values.new_tensor(float(values[:1].sum()) * len(values) * 2**-52)).sum())
    if energy:
        reached = values.square().cumsum(0) >= energy * total * (1 - 2**-40)
        keep = min(keep, int((~reached).sum()) + 1)
    return min(keep, rank) if rank else keep


def _randomised(matrix: Tensor, count: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    start = torch.randn(matrix.shape[1], count, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(matrix @ start)[0]
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vh


def _factors(like: LowRank, u: Tensor, s: Tensor, vh: Tensor) -> LowRank:
    """Both factors as large as each other; signs by each direction's largest entry, not by the library's choice."""
    if s.numel():
        largest = u.gather(0, u.abs().argmax(0, keepdim=True))
        sign = torch.where(largest < 0, -1.0, 1.0)
        u, vh = u * sign, vh * sign.T
    root = s.sqrt()
    return like._replace(b=u * root, a=root[:, None] * vh)
