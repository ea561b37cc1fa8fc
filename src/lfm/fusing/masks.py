"""Which of a model's changes are kept by their magnitude within the tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lfm.core.heavy import np
from lfm.fusing.engine import Rule, sums
from lfm.fusing.inputs import known, one_each
from lfm.fusing.joins import change, magnitude
from lfm.fusing.threshold import kth_largest
from lfm.tensors.lazy import size

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor
    from lfm.core.method import Run


def between(base: float, x: float, low: float, high: float, grow: float) -> float:
    """A change whose magnitude, in fp32, is at least `low` and less than `high`, multiplied by `grow`; else 0."""
    change = x - base
    large = abs(np.float32(change))
    return grow * change if large >= low and large < high else 0.0


def regrown(
    names: Sequence[str],
    base: Mapping[str, LazyTensor],
    model: Mapping[str, LazyTensor],
    kept: Mapping[str, tuple[float, float]],
) -> dict[str, float]:
    """By name, the l₁ norm of a model's changes by that of those within the bounds; 1 where one is next to 0."""
    within = Rule(magnitude, first=between, given=lambda n: {"low": kept[n][0], "high": kept[n][1], "grow": 1.0})
    before = sums(Rule(magnitude, first=change), names, [model], base=base)
    after = sums(within, names, [model], base=base)
    return {name: ratio(float(before[name][0, 0]), float(after[name][0, 0])) for name in names}


def ratio(before: float, after: float) -> float:
    """What brings a norm back; 1 where one is next to 0."""
    return before / after if min(before, after) >= 1e-7 else 1.0


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


def middles(
    names: Sequence[str],
    base: Mapping[str, LazyTensor],
    models: Sequence[Mapping[str, LazyTensor]],
    configs: Callable[[str], Any],
    run: Run,
) -> Callable[[str], dict[str, Any]]:
    """By name, what `between` is given of each model, by the configs' density, gamma and rescale."""
    count = len(models)

    def fractions(i: int) -> Callable[[str], tuple[float, float]]:
        return lambda name: (
            one_each("density", configs(name).density, count)[i],
            one_each("gamma", configs(name).gamma, count)[i],
        )

    bounds, grown = [], []
    for i, model in run.track(enumerate(models), "thresholds", count):
        bounds.append(known(run, f"bounds-{i}", names, lambda i=i, m=model: middle(names, base, m, fractions(i))))
        to_norm = [name for name in names if configs(name).rescale]
        grown.append(regrown(to_norm, base, model, bounds[-1]) if to_norm else {})

    def given(name: str) -> dict[str, Any]:
        return {
            "low": [bound[name][0] for bound in bounds],
            "high": [bound[name][1] for bound in bounds],
            "grow": [of.get(name, 1.0) for of in grown],
        }

    return given
