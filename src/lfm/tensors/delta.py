"""Changes from a base, and thresholds on their magnitudes: exact, without a sort, by histograms over streamed bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from lfm.core.heavy import torch
from lfm.tensors.lazy import parts, size
from lfm.tensors.parallel import each

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import LazyTensor

DIGITS = {2: (15,), 4: (15, 16), 8: (15, 16, 16, 16)}
"""Bytes an element → bits of each pass, from the highest. Without the sign, floats order as their bits do."""


def change_thresholds(
    base: Mapping[str, LazyTensor],
    model: Mapping[str, LazyTensor],
    names: Sequence[str],
    density: float,
    scope: Literal["model", "tensor"],
    *,
    workers: int | None = None,
) -> dict[str, float]:
    """By name, the magnitude that the fraction `density` of the changes from the base reaches.

    scope: of all tensors' entries together, or of each tensor's. At least one entry is kept. Streams, twice for fp32.
    """
    wide = (
        torch.float64 if any(t[name].dtype == torch.float64 for t in (base, model) for name in names) else torch.float32
    )

    def changes(name: str) -> list[Callable[[], Tensor]]:
        def change(read: Callable[[], list[Tensor]]) -> Tensor:
            before, after = read()
            return (after - before).to(wide)

        return [lambda read=read: change(read) for read in parts([base[name], model[name]])]

    def keep(count: int) -> int:
        return max(1, int(density * count))

    if scope == "model":
        every = [part for name in names for part in changes(name)]
        limit = kth_magnitude(every, keep(sum(size(base[name]) for name in names)), workers=workers)
        return dict.fromkeys(names, limit)
    return dict(each(lambda n: (n, kth_magnitude(changes(n), keep(size(base[n])), workers=1)), names, workers))


def kth_magnitude(parts: Sequence[Callable[[], Tensor]], keep: int, *, workers: int | None = None) -> float:
    """The keep-th largest |x| over all parts' elements, exact: at least `keep` elements are as large, fewer are larger.

    0.0 where there are no more than `keep` elements. Parts are flat, finite, of one floating dtype, and made anew in
    each pass: one pass for 16-bit floats, two for fp32, four for fp64. Memory: a few parts and one histogram a worker.
    """
    assert keep >= 1
    if not parts:
        return 0.0
    counts, dtype = _histogram(parts, 0, 0, workers)
    if int(counts.sum()) <= keep:
        return 0.0
    prefix, keep = _locate(counts, keep)
    digits = DIGITS[dtype.itemsize]
    for at in range(1, len(digits)):
        digit, keep = _locate(_histogram(parts, prefix, at, workers)[0], keep)
        prefix = prefix << digits[at] | digit
    return float(torch.tensor([prefix], dtype=_integer(dtype)).view(dtype))


def _locate(counts: Tensor, keep: int) -> tuple[int, int]:
    """The bin that holds the keep-th element from the top, and that element's place within the bin."""
    from_top = counts.flip(0).cumsum(0)
    down = int(torch.searchsorted(from_top, keep))
    return len(counts) - 1 - down, keep - (int(from_top[down - 1]) if down else 0)


def _histogram(
    parts: Sequence[Callable[[], Tensor]], prefix: int, at: int, workers: int | None
) -> tuple[Tensor, torch.dtype]:
    """How many elements have each value of the at-th digit, of those whose higher digits are `prefix`."""

    def count(part: Callable[[], Tensor]) -> tuple[Tensor, torch.dtype]:
        values = part()
        digits = DIGITS[values.dtype.itemsize]
        below = sum(digits[at + 1 :])
        bits = values.view(_integer(values.dtype))
        bits = bits & torch.iinfo(bits.dtype).max
        if at:
            bits = bits[bits >> (below + digits[at]) == prefix]
        digit = (bits >> below & (1 << digits[at]) - 1) if below or at else bits
        return torch.bincount(digit, minlength=1 << digits[at]), values.dtype

    total, dtype = None, None
    for counts, found in each(count, parts, workers):
        assert dtype in (None, found), "parts of one dtype"
        total, dtype = counts if total is None else total.add_(counts), found
    assert total is not None and dtype is not None, "at least one part"
    return total, dtype


def _integer(dtype: torch.dtype) -> torch.dtype:
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
