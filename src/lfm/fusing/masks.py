"""Which of a model's changes are kept by their magnitude within the tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lfm.core.heavy import np
from lfm.fusing.engine import Rule
from lfm.fusing.joins import change, magnitude
from lfm.fusing.threshold import kth_largest
from lfm.tensors.lazy import size

if TYPE_CHECKING:
    from lfm.core.model import LazyTensor


def between(base: float, x: float, low: float, high: float) -> float:
    """A change whose magnitude, in fp32, is at least `low` and less than `high`; else 0."""
    change = x - base
    large = abs(np.float32(change))
    return change if large >= low and large < high else 0.0


def middle(
    names: Sequence[str],
    base: Mapping[str, LazyTensor],
    model: Mapping[str, LazyTensor],
    fractions: Callable[[str], tuple[float, float]],
) -> dict[str, tuple[float, float]]:
    """By name, the bounds (low, high) within which the kept fraction lies, below the largest: fractions gives both."""
    asked = []
    for name in names:
        count, (density, gamma) = size(base[name]), fractions(name)
        kept = int(density * count) if density < 1 else count
        top = min(int(gamma * count), count - kept)
        asked.append((top, kept, count))
    ranks = [[r for r in (top, top + kept) if kept and 0 < r < count] for top, kept, count in asked]
    found = kth_largest(Rule(magnitude, first=change), [[name] for name in names], [model], ranks, base=base)
    bounds = {}
    for name, (top, kept, _), rank, limits in zip(names, asked, ranks, found):
        at = dict(zip(rank, limits))
        bounds[name] = (at.get(top + kept, 0.0), at.get(top, float("inf"))) if kept else (0.0, 0.0)
    return bounds
