"""Changes of low rank: sums are exact, cuts are the best there are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.core.interfaces import LowRank
from lfm.tensors.lowrank import cut, delta, factored, joined


def change(out: int, wide: int, rank: int, seed: int) -> LowRank:
    random = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(out, rank, generator=random), torch.randn(rank, wide, generator=random))


SIZES = st.integers(1, 20)


@settings(max_examples=60, deadline=None)
@given(out=SIZES, wide=SIZES, ranks=st.lists(st.integers(1, 24), min_size=1, max_size=3), seed=st.integers(0, 10**6))
def test_factors_side_by_side_are_the_sum(out: int, wide: int, ranks: list[int], seed: int) -> None:
    changes = [change(out, wide, rank, seed + i) for i, rank in enumerate(ranks)]
    weights = [0.5 - i for i in range(len(ranks))]
    whole = joined(changes, weights)
    assert whole.a.shape[0] == sum(ranks)
    known = sum(w * c.b.double() @ c.a.double() for w, c in zip(weights, changes))
    torch.testing.assert_close(delta(whole), known, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    out=SIZES, wide=SIZES, rank=st.integers(1, 24), keep=st.integers(1, 8), seed=st.integers(0, 10**6)
)  # rank may exceed both sides
def test_a_cuts_error_is_the_discarded_singular_values(out: int, wide: int, rank: int, keep: int, seed: int) -> None:
    whole = change(out, wide, rank, seed)
    found = cut(whole, rank=keep)
    values = torch.linalg.svdvals(delta(whole))
    assert found.change.a.shape[0] == min(keep, out, wide, rank)
    error = (delta(found.change) - delta(whole)).square().sum()
    torch.testing.assert_close(error, values[keep:].square().sum(), rtol=1e-9, atol=1e-20 + 1e-13 * found.energy)
    assert found.kept == pytest.approx(float(values[:keep].square().sum()), rel=1e-9)
    assert found.energy == pytest.approx(float(values.square().sum()), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(rank=st.integers(1, 12), energy=st.floats(0.05, 1), seed=st.integers(0, 10**6))
def test_an_energy_takes_the_least_rank_that_keeps_it(rank: int, energy: float, seed: int) -> None:
    whole = change(15, 11, rank, seed)
    found = cut(whole, energy=energy)
    kept = found.change.a.shape[0]
    shares = torch.linalg.svdvals(delta(whole)).square().cumsum(0) / found.energy
    assert shares[kept - 1] >= energy - 1e-9
    assert kept == 1 or shares[kept - 2] < energy + 1e-9


def test_without_a_limit_what_is_no_more_than_rounding_goes() -> None:
    whole = change(40, 30, 3, 0)
    doubled = cut(joined([whole, whole], [1, 1]))
    assert doubled.change.a.shape[0] == 3
    torch.testing.assert_close(delta(doubled.change), 2 * delta(whole), rtol=1e-12, atol=1e-12)
    nothing = cut(joined([whole, whole], [1, -1]))
    assert nothing.energy < 1e-20


@pytest.mark.parametrize("iterations", [0, 6])
@pytest.mark.parametrize("limit", [{"rank": 8, "energy": 0.0}, {"rank": 0, "energy": 0.5}])
def test_a_dense_change(iterations: int, limit: dict[str, float]) -> None:
    """Randomised, of a spectrum that falls slowly: the error is the best one within a thousandth."""
    random = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 200, generator=random, dtype=torch.float64))[0] for n in (300, 200))
    values = torch.arange(1, 201, dtype=torch.float64) ** -0.7
    matrix = u * values @ v.T
    like = LowRank(torch.empty(0), torch.empty(0))
    found = factored(matrix, like, iterations=iterations, generator=random, **limit)  # type: ignore[arg-type]
    kept = found.change.a.shape[0]
    shares = values.square().cumsum(0) / values.square().sum()
    assert kept == (8 if limit["rank"] else int((shares < 0.5).sum()) + 1)
    error = (matrix - delta(found.change)).square().sum()
    assert error <= values[kept:].square().sum() * 1.001
    assert found.kept == pytest.approx(found.energy - float(error), rel=1e-6)
