"""Solves for many keys against dense closed forms and against what defines them; all in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.editing import solve
from lfm.editing.covariance import rank_one

CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def drawn(seed: int, inner: int = 12, count: int = 4, outer: int = 5) -> tuple[torch.Tensor, ...]:
    """Keys, residuals, a second moment, other keys; fp64."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    others = draw(60, inner) * torch.linspace(0.3, 2, inner, dtype=torch.float64)
    return draw(inner, count), draw(outer, count), others.T @ others / len(others), draw(inner, 3)


@given(st.integers(0, 10_000), st.integers(1, 30), st.sampled_from([1e-3, 1.0, 50.0]))
@settings(max_examples=25, deadline=None)
def test_woodbury_is_the_dense_solve(seed: int, count: int, weight: float) -> None:
    keys, _, moment, _ = drawn(seed, count=count)
    dense = keys.T @ torch.linalg.inv(weight * moment + keys @ keys.T)
    torch.testing.assert_close(solve.balanced(torch.linalg.cholesky(moment), keys, weight), dense, rtol=1e-7, atol=1e-8)


def test_the_balanced_update_is_where_its_objective_is_flat() -> None:
    """∂/∂Δ of ‖ΔK − R‖² + λ tr(Δ C Δᵀ) is zero."""
    keys, wanted, moment, _ = drawn(1)
    change = (wanted @ solve.balanced(torch.linalg.cholesky(moment), keys, 2.0)).requires_grad_(True)
    objective = (change @ keys - wanted).square().sum() + 2.0 * torch.trace(change @ moment @ change.T)
    (slope,) = torch.autograd.grad(objective, change)
    assert slope.abs().max() < 1e-10


@pytest.mark.parametrize("seed", range(3))
def test_of_one_key_and_no_weight_it_is_the_rank_one_update(seed: int) -> None:
    """The identity: MEMIT in one layer, one fact, λ → 0 is ROME's closed form for the same key and value."""
    keys, wanted, moment, _ = drawn(seed, count=1)
    b, a = rank_one(wanted[:, 0], keys[:, 0], torch.linalg.cholesky(moment))
    rome = torch.outer(b, a)
    known = torch.linalg.cholesky(moment)
    torch.testing.assert_close(wanted @ solve.balanced(known, keys, 1e-13), rome, **CLOSE)
    torch.testing.assert_close(wanted @ solve.exact(known, keys), rome, **CLOSE)


@given(st.integers(0, 10_000), st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_the_exact_update_gives_every_key_its_value_with_the_least_disturbance(seed: int, count: int) -> None:
    keys, wanted, moment, _ = drawn(seed, count=min(count, 8))
    change = wanted @ solve.exact(torch.linalg.cholesky(moment), keys)
    assert (change @ keys - wanted).abs().max() < 1e-10 * (1 + wanted.abs().max())
    nudge = torch.randn(change.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    nudge -= nudge @ keys @ torch.linalg.pinv(keys)  # keeps ΔK
    cost = lambda d: torch.trace(d @ moment @ d.T)  # noqa: E731
    assert cost(change) <= cost(change + 0.01 * nudge) + 1e-12


def test_two_facts_of_one_key_share_what_they_ask() -> None:
    keys, wanted, moment, _ = drawn(2)
    keys[:, 1] = keys[:, 0]
    given = wanted @ solve.exact(torch.linalg.cholesky(moment), keys) @ keys
    torch.testing.assert_close(given[:, 0], (wanted[:, 0] + wanted[:, 1]) / 2, **CLOSE)
    torch.testing.assert_close(given[:, 2:], wanted[:, 2:], **CLOSE)


@given(st.integers(0, 10_000), st.permutations(range(4)))
@settings(max_examples=10, deadline=None)
def test_the_order_of_facts_does_not_matter(seed: int, order: list[int]) -> None:
    keys, wanted, moment, past = drawn(seed)
    known, basis = torch.linalg.cholesky(moment), solve.quiet(moment, 0.5).basis
    for made in (
        lambda k: solve.balanced(known, k, 1.0),
        lambda k: solve.exact(known, k),
        lambda k: solve.projected(basis, k, past, 1.0),
    ):
        torch.testing.assert_close(wanted[:, order] @ made(keys[:, order]), wanted @ made(keys), **CLOSE)


@given(st.integers(0, 10_000), st.integers(0, 3), st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_the_projected_update_is_alphaedits(seed: int, earlier: int, count: int) -> None:
    """Δᵀ = (P(KKᵀ + K_pK_pᵀ) + L2·I)⁻¹ P K Rᵀ with P = UUᵀ as a dense matrix."""
    keys, wanted, moment, past = drawn(seed, count=count)
    past = past[:, :earlier]
    basis = solve.quiet(moment, 0.4).basis
    p = basis @ basis.T
    dense = torch.linalg.solve(p @ (keys @ keys.T + past @ past.T) + 3.0 * torch.eye(12).double(), p @ keys @ wanted.T)
    torch.testing.assert_close(wanted @ solve.projected(basis, keys, past, 3.0), dense.T, **CLOSE)


def test_keys_that_are_to_be_kept_move_by_nothing() -> None:
    keys, wanted, moment, past = drawn(5)
    basis = solve.quiet(moment, 0.4).basis
    assert 0 < basis.shape[1] < len(moment)
    change = wanted @ solve.projected(basis, keys, past, 1e-6)
    kept = torch.eye(len(moment)).double() - basis @ basis.T  # its columns span what is kept
    assert (change @ kept).abs().max() < 1e-12 * change.abs().max() * len(moment)
    assert (change @ keys - wanted).norm() < wanted.norm()


def test_the_quiet_directions_hold_their_share() -> None:
    _, _, moment, _ = drawn(6)
    for share in (0.1, 0.4, 1.0):
        basis, energy = solve.quiet(moment, share)
        held = torch.trace(basis.T @ moment @ basis)
        assert held.item() == pytest.approx(energy)
        assert energy <= (share + 1e-12) * torch.trace(moment)
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double())
    assert basis.shape[1] == len(moment)


def test_a_place_that_is_written_again_is_no_past_key() -> None:
    """Kept as one, half of what its next fact asks would be missing: its own earlier value pulls the other way."""
    keys = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    again = torch.stack([3 * keys[:, 1], torch.ones(6, dtype=torch.float64)], 1)
    assert torch.equal(solve.others(keys, again), keys[:, [0, 2, 3]])
    assert solve.others(keys[:, :0], again).shape == (6, 0)
    basis = torch.eye(6, dtype=torch.float64)
    key = keys[:, 1:2]
    held = solve.projected(basis, key, keys, 1e-12) @ key
    free = solve.projected(basis, key, solve.others(keys, key), 1e-12) @ key
    torch.testing.assert_close(held, torch.full_like(held, 0.5), atol=1e-3, rtol=0)
    torch.testing.assert_close(free, torch.ones_like(free), atol=1e-3, rtol=0)
