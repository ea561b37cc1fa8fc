"""CMA-ES: known minima, one seed one path, and resuming from journalled values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cmaes import CMA

from lfm.runs.run import LocalRun
from lfm.search import generations


def sphere(points: np.ndarray[Any, Any]) -> list[float]:
    return [float(((p - 1) ** 2).sum()) for p in points]


def rotated_ellipsoid(dim: int) -> Callable[[Any], list[float]]:
    """Axes of lengths 1 to 1000, in no direction of the coordinates; its minimum is 3 at every coordinate 2."""
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, dim)))
    scale = 10.0 ** (3 * np.arange(dim) / (dim - 1))
    return lambda points: [float((scale * (turn @ (p - 2))) @ (scale * (turn @ (p - 2)))) + 3 for p in points]


class Best(NamedTuple):
    """The lowest value of a whole search, where it lies, and the lowest of each generation."""

    point: Any
    value: float
    history: tuple[float, ...]


def search(fn: Any, dim: int, here: Path, *, budget: int, seed: int = 0, popsize: int = 10) -> Best:
    made = list(generations(fn, dim, sigma=1.0, popsize=popsize, budget=budget, run=LocalRun(seed, here), seed=seed))
    best = min(made, key=lambda one: one.values[one.best])
    return Best(best.points[best.best], best.values[best.best], tuple(one.values[one.best] for one in made))


def test_it_finds_the_minimum_of_a_sphere(tmp_path: Path) -> None:
    best = search(sphere, 5, tmp_path, budget=2000)
    assert best.value < 1e-10
    assert np.allclose(best.point, 1, atol=1e-4)
    assert best.value == min(best.history)


def test_it_finds_the_minimum_of_a_rotated_ellipsoid(tmp_path: Path) -> None:
    """Condition number 10⁶ and no separable axis: what needs the whole covariance."""
    best = search(rotated_ellipsoid(6), 6, tmp_path, budget=4000)
    assert best.value == pytest.approx(3, abs=1e-8)
    assert np.allclose(best.point, 2, atol=1e-3)


def test_it_is_the_librarys_ask_and_tell(tmp_path: Path) -> None:
    ours = list(generations(sphere, 4, sigma=0.7, popsize=6, budget=31, run=LocalRun(0, tmp_path), seed=11))
    assert len(ours) == 5, "whole generations, never more than the budget"
    theirs = CMA(mean=np.zeros(4), sigma=0.7, population_size=6, seed=11)
    for made in ours:
        points = [theirs.ask() for _ in range(6)]
        assert np.array_equal(made.points, points)
        theirs.tell([(p, sphere(p[None])[0]) for p in points])
        assert made.values == tuple(sphere(made.points)) and made.values[made.best] == min(made.values)


def test_the_seed_decides_the_path(tmp_path: Path) -> None:
    one, two, other = (
        search(sphere, 3, tmp_path / name, budget=100, seed=s) for name, s in (("a", 1), ("b", 1), ("c", 2))
    )
    assert np.array_equal(one.point, two.point) and one.history == two.history
    assert one.history != other.history


@pytest.mark.parametrize("after", [0, 1, 7, 19])
def test_interrupted_and_resumed_it_finds_the_same(after: int, tmp_path: Path) -> None:
    calls = 0

    class Killed(BaseException):
        pass

    def dying(points: Any) -> list[float]:
        nonlocal calls
        if calls == after:
            raise Killed
        calls += 1
        return sphere(points)

    def counting(points: Any) -> list[float]:
        nonlocal calls
        calls += 1
        return sphere(points)

    whole = search(sphere, 3, tmp_path / "whole", budget=200)
    with pytest.raises(Killed):
        search(dying, 3, tmp_path / "broken", budget=200)
    resumed = search(counting, 3, tmp_path / "broken", budget=200)
    assert calls == 20, "no generation is evaluated twice"
    assert np.array_equal(resumed.point, whole.point) and resumed.history == whole.history


def test_values_that_are_no_numbers_are_the_worst(tmp_path: Path) -> None:
    def torn(points: Any) -> list[float]:
        return [float("nan") if p[0] > 0.5 else float("inf") if p[0] < -2 else float(p @ p) for p in points]

    best = search(torn, 3, tmp_path, budget=600)
    assert best.value < 1e-6


def test_it_ends_where_nothing_is_left_to_find(tmp_path: Path) -> None:
    best = search(lambda points: [0.0] * len(points), 2, tmp_path, budget=100_000)
    assert len(best.history) < 10_000
