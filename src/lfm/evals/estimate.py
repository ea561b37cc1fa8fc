"""Metrics as sums over records, so that one matrix product resamples all of them.

A metric is a function of the sums of k statistics of each record (hits and counts, true positives by class, bins of a
calibration curve). Its bootstrap is the same function of resampled sums: W S with W (b, n) how often each of n records
was drawn and S (n, k) their statistics. Percentile intervals: Efron 1979, doi 10.1214/aos/1176344552.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import msgspec

from lfm.core.heavy import np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[np.float64]

LEVEL = 0.95
DRAWS = 4_000_000
"""Draws held in memory at once."""


@final
class Metric(msgspec.Struct, frozen=True, kw_only=True):
    """A metric's value and 95 % interval. n: records it rests on. basis: what it counts, in words."""

    value: float
    low: float
    high: float
    n: int
    basis: str = ""


@final
@dataclass(frozen=True, eq=False)
class Measure:
    """A metric before it is summed: statistics (n, k) a record, and the function of their sums (…, k) → (…)."""

    name: str
    stats: Array
    reduce: Callable[[Array], Array]
    basis: str = ""

    def __post_init__(self) -> None:
        assert self.stats.ndim == 2, self.name


def mean(name: str, values: ArrayLike, basis: str = "") -> Measure:
    """The mean over records; records whose value is NaN do not take part."""
    return ratio(name, values, ~np.isnan(np.asarray(values, dtype=np.float64)), basis=basis)


def ratio(
    name: str,
    parts: ArrayLike,
    wholes: ArrayLike,
    *,
    after: Callable[[Array], Array] | None = None,
    basis: str = "",
) -> Measure:
    """after(Σ parts / Σ wholes): such as perplexity, exp of summed losses over summed tokens."""
    stats = np.stack([np.nan_to_num(_floats(parts), posinf=np.inf, neginf=-np.inf), _floats(wholes)], axis=1)

    def reduce(sums: Array) -> Array:
        found = _divided(sums[..., 0], sums[..., 1])
        return after(found) if after else found

    return Measure(name, stats, reduce, basis)


def grouped_mean(name: str, values: ArrayLike, groups: Sequence[str], basis: str = "") -> Measure:
    """The mean over groups of each group's mean (a macro-average); a group that was not drawn does not take part."""
    names = sorted(set(groups))
    held = _floats(values)
    places = np.array([names.index(g) for g in groups], dtype=np.int64)
    stats = np.zeros((len(held), 2 * len(names)))
    rows = np.arange(len(held))
    stats[rows, places] = np.nan_to_num(held)
    stats[rows, len(names) + places] = ~np.isnan(held)

    def reduce(sums: Array) -> Array:
        return _mean_of_known(_divided(sums[..., : len(names)], sums[..., len(names) :]))

    return Measure(name, stats, reduce, basis)


def macro_f1(truth: ArrayLike, predicted: ArrayLike, classes: int, basis: str = "") -> Measure:
    """The mean of 2tp / (2tp + fp + fn) over the classes that occur in truth or prediction.

    truth, predicted: (n,) places of classes; a prediction of −1 names no class.
    """
    true, said = np.asarray(truth, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    is_true = true[:, None] == np.arange(classes)
    is_said = said[:, None] == np.arange(classes)
    stats = np.concatenate([is_true & is_said, is_true ^ is_said], axis=1).astype(np.float64)

    def reduce(sums: Array) -> Array:
        hits, misses = sums[..., :classes], sums[..., classes:]
        return _mean_of_known(_divided(2 * hits, 2 * hits + misses))

    return Measure("macro_f1", stats, reduce, basis or "mean over the classes that occur")


def calibration_error(confidence: ArrayLike, right: ArrayLike, bins: int = 15) -> Measure:
    """Σ_bins |right − confidence| / n over equal-width bins (ECE: Naeini 2015; 15 bins: Guo 2017, arXiv 1706.04599)."""
    sure, hit = _floats(confidence), _floats(right)
    place = np.clip(np.ceil(sure * bins).astype(np.int64) - 1, 0, bins - 1)  # bins are (low, high]
    stats = np.zeros((len(sure), bins + 1))
    stats[np.arange(len(sure)), place] = hit - sure
    stats[:, bins] = 1.0

    def reduce(sums: Array) -> Array:
        return _divided(np.abs(sums[..., :bins]).sum(-1), sums[..., bins])

    return Measure("ece", stats, reduce, f"{bins} equal-width bins of the top class's probability")


def harmonic_mean(name: str, parts: Sequence[Measure], basis: str = "") -> Measure:
    """The harmonic mean of other measures; 0 where one of them is 0."""
    stats = np.concatenate([part.stats for part in parts], axis=1)
    ends = np.cumsum([part.stats.shape[1] for part in parts])

    def reduce(sums: Array) -> Array:
        pieces = np.split(sums, ends[:-1], axis=-1)
        found = np.stack([part.reduce(piece) for part, piece in zip(parts, pieces, strict=True)], axis=-1)
        with np.errstate(divide="ignore"):
            return len(parts) / (1.0 / found).sum(-1)

    return Measure(name, stats, reduce, basis)


def difference(before: Measure, after: Measure) -> Measure:
    """after − before of the same records, resampled together."""
    split = before.stats.shape[1]

    def reduce(sums: Array) -> Array:
        return after.reduce(sums[..., split:]) - before.reduce(sums[..., :split])

    return Measure(before.name, np.concatenate([before.stats, after.stats], axis=1), reduce, after.basis)


def estimates(measures: Sequence[Measure], *, seed: int, bootstrap: int) -> dict[str, Metric]:
    """Each measure's value and its percentile interval over `bootstrap` resamples of the records, the same for all.

    An interval is widened where it would not hold the value (biased metrics such as ECE). bootstrap 0: value alone.
    """
    if not measures:
        return {}
    n = len(measures[0].stats)
    assert all(len(m.stats) == n for m in measures)
    drawn: list[list[Array]] = [[] for _ in measures]
    random = np.random.Generator(np.random.Philox(seed))
    step = max(1, DRAWS // max(n, 1))
    for start in range(0, bootstrap, step):
        rows = min(step, bootstrap - start)
        places = random.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        weights = np.bincount(places.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
        for kept, measure in zip(drawn, measures, strict=True):
            with np.errstate(invalid="ignore"):  # a record of infinite loss that was not drawn: 0 · ∞
                kept.append(measure.reduce(weights @ measure.stats))
    return {m.name: _metric(m, np.concatenate(d) if d else np.zeros(0)) for m, d in zip(measures, drawn, strict=True)}


def _metric(measure: Measure, drawn: Array) -> Metric:
    value = float(measure.reduce(measure.stats.sum(0)))
    known = drawn[~np.isnan(drawn)]
    low, high = value, value
    if len(known):
        # Order statistics rather than interpolation, which cannot mix finite values with infinite ones.
        ends = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
        low, high = min(value, float(ends[0])), max(value, float(ends[1]))
    n = int((measure.stats != 0).any(axis=1).sum())
    return Metric(value=value, low=low, high=high, n=n, basis=measure.basis)


def _floats(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)


def _divided(parts: Array, wholes: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(wholes > 0, parts / wholes, np.nan)


def _mean_of_known(values: Array) -> Array:
    known = ~np.isnan(values)
    return _divided(np.where(known, values, 0.0).sum(-1), known.sum(-1).astype(np.float64))
