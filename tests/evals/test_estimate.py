"""Metrics against scikit-learn's and by hand, and the intervals around them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from lfm.evals.estimate import (
    Measure,
    calibration_error,
    difference,
    estimates,
    grouped_mean,
    harmonic_mean,
    macro_f1,
    mean,
    ratio,
)

CLASSES = 4
LABELS = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1, max_size=40)
NUMBERS = st.lists(st.floats(-5, 5), min_size=1, max_size=30)


def value(measure: Measure) -> float:
    return estimates([measure], seed=0, bootstrap=0)[measure.name].value


@settings(max_examples=100, deadline=None)
@given(pairs=LABELS)
def test_accuracy_and_macro_f1_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    truth, said = (list(column) for column in zip(*pairs))
    assert value(mean("accuracy", np.equal(truth, said))) == pytest.approx(accuracy_score(truth, said))
    assert value(macro_f1(truth, said, CLASSES)) == pytest.approx(f1_score(truth, said, average="macro"))


@settings(max_examples=50, deadline=None)
@given(pairs=LABELS, seed=st.integers(0, 10))
def test_an_interval_holds_its_value(pairs: list[tuple[int, int]], seed: int) -> None:
    truth, said = (list(column) for column in zip(*pairs))
    sure = [0.5 + said_ / 10 for said_ in said]
    made = estimates(
        [
            mean("accuracy", np.equal(truth, said)),
            macro_f1(truth, said, CLASSES),
            calibration_error(sure, np.equal(truth, said)),
            ratio("perplexity", sure, truth, after=np.exp),
        ],
        seed=seed,
        bootstrap=50,
    )
    for metric in made.values():
        assert np.isnan(metric.value) or metric.low <= metric.value <= metric.high


@settings(max_examples=30, deadline=None)
@given(pairs=LABELS)
def test_a_resampled_metric_is_the_metric_of_the_resample(pairs: list[tuple[int, int]]) -> None:
    truth, said = (np.array(column) for column in zip(*pairs))
    measure = macro_f1(truth, said, CLASSES)
    drawn = np.random.default_rng(0).integers(len(truth), size=len(truth))
    weights = np.bincount(drawn, minlength=len(truth))
    assert measure.reduce(weights @ measure.stats) == pytest.approx(
        f1_score(truth[drawn], said[drawn], average="macro")
    )


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    n = 4000
    values = np.random.default_rng(0).normal(size=n)
    metric = estimates([mean("x", values)], seed=0, bootstrap=2000)["x"]
    half = 1.96 * values.std() / n**0.5
    # The ends of 2000 resamples stray by about 3 % of the width; 10 % is three times that.
    assert metric.low == pytest.approx(values.mean() - half, abs=0.2 * half)
    assert metric.high == pytest.approx(values.mean() + half, abs=0.2 * half)
    assert metric.n == n


def test_one_seed_gives_one_interval_however_it_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=50)
    first = estimates([mean("x", values)], seed=3, bootstrap=100)
    assert estimates([mean("x", values)], seed=3, bootstrap=100) == first
    assert estimates([mean("x", values)], seed=4, bootstrap=100) != first
    monkeypatch.setattr("lfm.evals.estimate.DRAWS", 50 * 7)
    assert estimates([mean("x", values)], seed=3, bootstrap=100) == first


def test_calibration_error_by_hand() -> None:
    # Bins (4/15, 5/15] and (13/15, 14/15]: |0 − 0.3| · 1/3 and |1/2 − 0.9| · 2/3.
    assert value(calibration_error([0.3, 0.9, 0.9], [0, 1, 0])) == pytest.approx((0.3 + 2 * 0.4) / 3)
    assert value(calibration_error([1.0, 1.0], [1, 1])) == 0.0
    # A confidence on a bin's edge belongs below it; 0 to the first bin.
    assert value(calibration_error([1 / 15, 0.0], [1, 0])) == pytest.approx((1 - 1 / 15) / 2)


def test_grouped_means_weigh_groups_alike() -> None:
    assert value(grouped_mean("x", [1, 1, 1, 0], ["a", "a", "a", "b"])) == 0.5
    assert value(grouped_mean("x", [1, np.nan, 0, 0], ["a", "a", "b", "b"])) == 0.5
    assert value(grouped_mean("x", [1, np.nan], ["a", "b"])) == 1.0


def test_records_without_a_value_take_no_part() -> None:
    metric = estimates([mean("x", [1.0, np.nan, 0.0])], seed=0, bootstrap=10)["x"]
    assert metric.value == 0.5 and metric.n == 2
    assert np.isnan(value(mean("x", [np.nan])))


def test_an_infinite_loss_is_told_as_such() -> None:
    metric = estimates([ratio("x", [1.0, np.inf], [1, 1], after=np.exp)], seed=0, bootstrap=20)["x"]
    assert metric.value == np.inf and metric.high == np.inf


@pytest.mark.parametrize(("parts", "expected"), [((1.0, 0.5, 0.25), 3 / 7), ((1.0, 0.0, 1.0), 0.0), ((1, 1, 1), 1.0)])
def test_harmonic_means(parts: tuple[float, ...], expected: float) -> None:
    made = harmonic_mean("s", [mean(str(i), [p]) for i, p in enumerate(parts)])
    assert value(made) == pytest.approx(expected)


def test_a_paired_difference_is_surer_than_its_parts() -> None:
    random = np.random.default_rng(0)
    before = random.normal(size=200)
    after = before + 0.1
    metric = estimates([difference(mean("x", before), mean("x", after))], seed=0, bootstrap=500)["x"]
    assert metric.low == pytest.approx(0.1) and metric.high == pytest.approx(0.1)


@settings(max_examples=30, deadline=None)
@given(values=NUMBERS)
def test_ratios_are_of_sums(values: list[float]) -> None:
    wholes = np.arange(1, len(values) + 1)
    assert value(ratio("x", values, wholes)) == pytest.approx(sum(values) / wholes.sum())
