"""Distillation losses against their closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lfm.train import losses

KINDS = ("forward", "reverse", "jsd")


def logits(seed: int, rows: int = 5, width: int = 7, spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_two_outcomes_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2): every divergence has a value that fits on one line."""
    teacher, student = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 1.0]]).log()
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    m = (0.625, 0.375)
    jsd = (
        0.75 * math.log(0.75 / m[0])
        + 0.25 * math.log(0.25 / m[1])
        + 0.5 * math.log(0.5 / m[0])
        + 0.5 * math.log(0.5 / m[1])
    ) / 2
    for kind, value in zip(KINDS, (forward, reverse, jsd)):
        assert losses.kd(student, teacher, 1.0, kind).item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_answers_cost_nothing_and_shifted_logits_are_equal_answers(kind: losses.Divergence) -> None:
    x = logits(0)
    assert losses.kd(x, x + 3.0, 2.0, kind).item() == pytest.approx(0.0, abs=1e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), temperature=st.floats(0.5, 8.0))
def test_divergences_are_never_negative_and_jsd_is_symmetric_and_at_most_log_two(seed: int, temperature: float) -> None:
    s, t = logits(seed), logits(seed + 1)
    for kind in KINDS:
        assert losses.kd(s, t, temperature, kind).item() >= -1e-6
    assert losses.kd(s, t, 1.0, "jsd").item() <= math.log(2) + 1e-6
    torch.testing.assert_close(losses.kd(s, t, temperature, "jsd"), losses.kd(t, s, temperature, "jsd"))
    torch.testing.assert_close(losses.kd(s, t, temperature, "reverse"), losses.kd(t, s, temperature, "forward"))


def test_forward_kl_is_torchs_own() -> None:
    s, t = logits(1), logits(2)
    expected = F.kl_div(F.log_softmax(s, -1), F.log_softmax(t, -1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(losses.kd(s, t), expected)


def test_gradient_at_high_temperature_is_that_of_matching_centred_logits() -> None:
    """1503.02531, eq. 4: for large T, T² KL has the gradient (s − mean s − (t − mean t)) / V."""
    s, t = logits(3).double().requires_grad_(), logits(4).double()
    losses.kd(s.float(), t, 1000.0).backward()
    assert s.grad is not None
    centred = (s - s.mean(-1, keepdim=True) - (t - t.mean(-1, keepdim=True))).detach()
    torch.testing.assert_close(s.grad, centred / s.shape[-1] / s.shape[0], rtol=2e-2, atol=1e-4)


def test_forward_kl_has_the_gradient_of_cross_entropy_with_soft_labels() -> None:
    s, t = logits(5).requires_grad_(), logits(6)
    (by_kl,) = torch.autograd.grad(losses.kd(s, t), s)
    (by_ce,) = torch.autograd.grad(F.cross_entropy(s, t.softmax(-1)), s)
    torch.testing.assert_close(by_kl, by_ce)


def test_an_answer_the_teacher_rules_out_costs_nothing_forward() -> None:
    teacher = torch.tensor([[0.0, 0.0, -math.inf]])
    student = torch.zeros(1, 3, requires_grad=True)
    value = losses.kd(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(math.log(1.5))
    assert student.grad is not None and bool(torch.isfinite(student.grad).all())


def test_reduced_precision_logits_are_compared_in_fp32() -> None:
    s, t = logits(7).bfloat16(), logits(8).bfloat16()
    value = losses.kd(s, t, 2.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, losses.kd(s.float(), t.float(), 2.0))


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 7))
def test_top_k_never_exceeds_the_full_divergence_and_reaches_it(seed: int, k: int) -> None:
    """Lumping outcomes together loses information (the data-processing inequality); with all k told none is lost."""
    s, t = logits(seed), logits(seed + 1)
    told, ids = F.log_softmax(t, -1).topk(k, -1)
    full = losses.kd(s, t).item()
    assert losses.kd_topk(s, ids, told).item() <= full + 1e-5
    if k == 7:
        assert losses.kd_topk(s, ids, told).item() == pytest.approx(full, abs=1e-4)


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 7))
def test_completed_top_k_is_a_distribution_that_agrees_where_the_teacher_spoke(seed: int, k: int) -> None:
    t = F.log_softmax(logits(seed), -1)
    told, ids = t.topk(k, -1)
    whole = losses.complete(ids, told, 7)
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(5))
    torch.testing.assert_close(whole.gather(-1, ids).exp(), told.exp(), rtol=1e-5, atol=1e-6)
    if k >= 6:  # the one left over is determined
        torch.testing.assert_close(whole.exp(), t.exp(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_what_only_fills_a_row_of_the_likeliest_is_of_the_rest(kind: Any) -> None:
    """An endpoint told one answer where others have three: .6, and .1 for each of the four others of five."""
    ids = torch.tensor([[2, 0, 1]])
    told = torch.tensor([[0.6, 0.0, 0.0]]).log()
    whole = losses.complete(ids, told, 5)
    torch.testing.assert_close(whole.exp(), torch.tensor([[0.1, 0.1, 0.6, 0.1, 0.1]]))
    sure = losses.complete(ids, torch.tensor([[1.0, 0.0, 0.0]]).log(), 5)
    torch.testing.assert_close(sure.exp(), torch.eye(5)[None, 2])
    assert losses.kd(torch.zeros(1, 5), sure, 1.0, kind).isfinite()


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), beta=st.floats(0.01, 0.99))
def test_the_generalised_jsd_is_written_out_and_its_ends_are_the_two_divergences(seed: int, beta: float) -> None:
    s, t = (logits(seed + i).double().log_softmax(-1) for i in (0, 1))
    m = beta * t.exp() + (1 - beta) * s.exp()
    expected = (beta * t.exp() * (t - m.log()) + (1 - beta) * s.exp() * (s - m.log())).sum(-1)
    torch.testing.assert_close(losses.jsd(s, t, beta), expected)
    torch.testing.assert_close(losses.jsd(s, t, beta), losses.jsd(t, s, 1 - beta))
    for end, near, share in ((0.0, 1e-8, 1e-8), (1.0, 1 - 1e-8, 1e-8)):  # off by share · χ², which may be large
        torch.testing.assert_close(losses.jsd(s, t, end), losses.jsd(s, t, near) / share, rtol=1e-3, atol=1e-5)
    assert torch.equal(losses.jsd(s, t, 0.0), losses.divergence(s, t, "forward"))
    assert torch.equal(losses.jsd(s, t, 1.0), losses.divergence(s, t, "reverse"))
