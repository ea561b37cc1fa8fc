"""Inner products of whole tensors, or of their rows: all that interpolation on a sphere needs to know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any

from lfm.core.heavy import np
from lfm.fusing.engine import Rule, sums
from lfm.fusing.joins import change, product

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


def gram(
    names: Iterable[str],
    sources: Sequence[Mapping[str, LazyTensor]],
    *,
    base: Mapping[str, LazyTensor] | None = None,
    width: Callable[[str], int] | None = None,
) -> dict[str, Any]:
    """By name, fp64 (groups, n, n): the models' inner products, of their changes where there is a base. One pass."""
    n = len(sources)
    pairs = list(combinations_with_replacement(range(n), 2))
    rule = Rule(product, first=change if base is not None else None, width=width)
    found = {}
    for name, totals in sums(rule, names, sources, pairs, base=base).items():
        found[name] = np.empty((len(totals), n, n))
        for place, (a, b) in enumerate(pairs):
            found[name][:, a, b] = found[name][:, b, a] = totals[:, place]
    return found
