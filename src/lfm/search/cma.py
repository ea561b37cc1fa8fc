"""Minimise a function of some numbers from its values alone, by CMA-ES or another search, a generation at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.heavy import np
from lfm.core.method import Run
from lfm.search.searchers import Kind, searcher

if TYPE_CHECKING:
    from numpy.typing import NDArray

Points = Callable[["NDArray[Any]"], Sequence[float]]
"""(n, dim) float64 points → their n values, the lower the better."""


class Generation(NamedTuple):
    """One generation: points (popsize, dim) and their values."""

    number: int
    points: NDArray[Any]
    values: tuple[float, ...]

    @property
    def best(self) -> int:
        """Row of the lowest value, the first of equals."""
        return min(range(len(self.values)), key=self.values.__getitem__)


def generations(
    evaluate: Points,
    dim: int,
    *,
    sigma: float,
    popsize: int,
    budget: int,
    run: Run,
    seed: int,
    name: str = "generation",
    kind: Kind = "cma",
) -> Iterator[Generation]:
    """budget // popsize generations of a search (CMA-ES, unless another is named) from 0 ∈ R^dim with step size sigma.

    Each generation's values are a step of the run, so that an interrupted search is resumed by telling them again: its
    points follow from the seed and the values. It ends early only where the search has converged to machine precision.
    A value that is not a number counts as infinitely bad.
    """
    assert popsize >= 2 and budget >= popsize, "a search needs two points a generation, and one generation"
    search = searcher(kind, dim, sigma=sigma, popsize=popsize, budget=budget, seed=seed)
    for index in run.track(range(budget // popsize), name, budget // popsize):
        points = search.ask()
        values = run.step(f"{name} {index}", lambda points=points: finite(evaluate(points)))
        assert len(values) == popsize, f"{len(values)} values for {popsize} points"
        search.tell(points, values)
        yield Generation(index, points, tuple(values))
        if search.done():
            return


def finite(values: Sequence[float]) -> list[float]:
    """The values as a journal can hold them and a search can take them."""
    # The largest float, not infinity: CMA-ES takes differences of values, and a journal holds JSON.
    return [float(v) if math.isfinite(v) else np.finfo(np.float64).max.item() for v in values]
