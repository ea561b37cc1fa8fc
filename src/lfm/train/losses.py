"""Losses between a teacher's answers and a student's. Logits are (…, V), arithmetic fp32, results means over rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from lfm.core.heavy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Literal["forward", "reverse", "jsd"]


def kd(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, kind: Divergence = "forward", beta: float = 0.5
) -> Tensor:
    """T² · D(p_T^t, p_T^s) with p_T = softmax(logits / T), mean over rows (1503.02531).

    forward: KL(teacher ‖ student), covers all of the teacher's modes. reverse: KL(student ‖ teacher), keeps to them.
    jsd: the mean of both sides' KL to their middle (2306.13649), by β. T² keeps the gradient's size as T grows.
    """
    t = F.log_softmax(teacher.float() / temperature, -1)
    s = F.log_softmax(student.float() / temperature, -1)
    return temperature**2 * divergence(s, t, kind, beta).mean()


def divergence(student: Tensor, teacher: Tensor, kind: Divergence = "forward", beta: float = 0.5) -> Tensor:
    """D of log-probabilities (…, V), in nats, one number a row. A probability of zero (log −inf) counts as none."""
    if kind == "forward":
        return kl(teacher, student)
    if kind == "reverse":
        return kl(student, teacher)
    return jsd(student, teacher, beta)


def jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """β KL(t ‖ m) + (1 − β) KL(s ‖ m), m = β t + (1 − β) s, of log-probabilities (…, V), one number a row (2306.13649).

    Of β = 0 and 1 it is the limit after division by β or 1 − β: KL(t ‖ s) (forward) and KL(s ‖ t) (reverse).
    """
    if beta in (0, 1):
        return kl(student, teacher) if beta else kl(teacher, student)
    middle = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ p (log p − log q) over the last axis, of log-probabilities. 0 · log 0 = 0."""
    mass = p.exp()
    return torch.where(mass > 0, mass * (p - q), torch.zeros_like(mass)).sum(-1)


def symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(p ‖ q) + KL(q ‖ p) of p = softmax(a), q = softmax(b); mean over rows, 0 where they agree."""
    p, q = F.log_softmax(a.float(), -1), F.log_softmax(b.float(), -1)
    return (kl(p, q) + kl(q, p)).mean()


def entropy(logits: Tensor, diversity: float = 0.0) -> Tensor:
    """−Σ p log p of softmax(logits), mean over rows, in nats: how unsure a model is.

    diversity: times the entropy of the rows' mean p is taken off (2002.08546): answers sure, and not all the same.
    """
    told = F.log_softmax(logits.float(), -1)
    unsure = -(told.exp() * told).sum(-1).mean()
    return unsure + diversity * balance(logits) if diversity else unsure


def balance(logits: Tensor) -> Tensor:
    """Σ p̄ log p̄ of the mean p̄ of softmax(logits) over rows, in nats: −log V where all answers are as frequent."""
    told = F.log_softmax(logits.float(), -1)
    mean = torch.logsumexp(told.reshape(-1, told.shape[-1]), 0) - torch.log(torch.tensor(float(told[..., 0].numel())))
    return (mean.exp() * mean).sum()


def complete(ids: Tensor, logprobs: Tensor, vocabulary: int) -> Tensor:
    """(N, V) log-probabilities from a teacher's k best (N, k): the mass it did not tell spread evenly over the rest.

    Of all completions it has the most entropy, and with it `kd` works at any temperature. k = V gives the teacher back.
    Those told with −inf fill a row of which fewer were told, and are of the rest.
    """
    logprobs = logprobs.to(torch.promote_types(logprobs.dtype, torch.float32))
    told = logprobs > -math.inf
    rest = torch.log1p(-logprobs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))
    even = rest - (vocabulary - told.sum(-1, keepdim=True)).clamp(min=1).to(rest.dtype).log()
    each = even.expand(*ids.shape[:-1], vocabulary)
    return F.log_softmax(each.scatter(-1, ids, torch.where(told, logprobs, even)), -1)


def kd_topk(student: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """Forward KL over k + 1 outcomes, the teacher's k best and all else; mean over rows. Never above the full KL."""
    s = F.log_softmax(student.float(), -1)
    told = s.gather(-1, ids)
    return kl(_with_rest(logprobs.float()), _with_rest(told)).mean()


def _with_rest(logprobs: Tensor) -> Tensor:
    rest = torch.log1p(-logprobs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))
    return torch.cat([logprobs, rest], -1)
