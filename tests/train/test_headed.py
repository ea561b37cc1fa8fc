"""A student's loss through its head, chunk by chunk: the numbers of autograd on whole logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lfm.models.headless import Headless
from lfm.train.headed import Best, headed
from lfm.train.losses import Divergence

KINDS: tuple[Divergence, ...] = ("forward", "reverse", "jsd")


def plain(
    student: Headless, teacher: Any, labels: Any, alpha: float, temperature: float, kind: str, beta: float
) -> torch.Tensor:
    """The definition, on whole logits, in the precision of the weights."""
    x = F.linear(*student)
    if isinstance(teacher, Headless):
        teacher = F.linear(*teacher)
    if isinstance(teacher, Best) and kind == "forward" and temperature == 1:
        known = teacher.logprobs.exp()
        inside = torch.zeros_like(x, dtype=torch.bool).scatter(-1, teacher.ids, True)
        told = x.log_softmax(-1)
        soft = (known * (teacher.logprobs - told.gather(-1, teacher.ids))).sum(-1)
        if teacher.ids.shape[-1] < x.shape[-1]:
            rest = 1 - known.sum(-1)
            soft = soft + rest * (rest.log() - told.masked_fill(inside, -math.inf).logsumexp(-1))
    else:
        if isinstance(teacher, Best):
            rest = (1 - teacher.logprobs.exp().sum(-1, keepdim=True)) / (x.shape[-1] - teacher.ids.shape[-1])
            teacher = rest.log().expand_as(x).scatter(-1, teacher.ids, teacher.logprobs)
        width = min(x.shape[-1], teacher.shape[-1])
        s, t = ((y[:, :width] / temperature).log_softmax(-1) for y in (x, teacher))
        q, p = s.exp(), t.exp()
        m = beta * p + (1 - beta) * q
        soft = {
            "forward": p * (t - s),
            "reverse": q * (s - t),
            "jsd": beta * p * (t - m.log()) + (1 - beta) * q * (s - m.log()),
        }[kind].sum(-1)
    hard = F.cross_entropy(x, labels) if alpha < 1 else 0.0
    return (1 - alpha) * hard + alpha * temperature**2 * soft.mean()


def student(places: int = 7, width: int = 5, vocabulary: int = 23, dtype: Any = torch.float64, seed: int = 0) -> Any:
    draw = torch.Generator().manual_seed(seed)
    sizes = ((places, width), (vocabulary, width), (vocabulary,))
    return Headless(
        *(torch.randn(size, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes)
    )


def teacher(of: str, places: int = 7, vocabulary: int = 23, k: int = 4, dtype: Any = torch.float64) -> Any:
    other = student(places, 3, vocabulary, dtype, seed=1)
    other = Headless(*(part.detach() for part in other))
    if of == "head":
        return other
    logits = F.linear(*other)
    if of == "logits":
        return logits
    told = logits.log_softmax(-1).topk(vocabulary if of == "all" else k, -1)
    return Best(told.indices, told.values)


def gradients(loss: torch.Tensor, of: Headless) -> tuple[Any, ...]:
    return torch.autograd.grad(loss, [t for t in of if t is not None])


@pytest.mark.parametrize("of", ["logits", "head", "best"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [1.0, 0.7, 0.0])
def test_loss_and_gradients_are_those_of_autograd_on_whole_logits(
    of: str, kind: Divergence, temperature: float, alpha: float
) -> None:
    mine, theirs = student(), teacher(of)
    labels = torch.arange(7) * 3
    beta = 0.3
    expected = plain(mine, theirs, labels, alpha, temperature, kind, beta)
    slopes = gradients(expected, mine)
    for room in (1, 3 * 23 * 8, 0):  # a row at a time, three, and all at once
        found = headed(mine, theirs, labels, alpha=alpha, temperature=temperature, kind=kind, beta=beta, room=room)
        torch.testing.assert_close((found, *gradients(found, mine)), (expected, *slopes), rtol=1e-10, atol=1e-12)
