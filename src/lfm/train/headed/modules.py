"""The pass: rows in chunks through the head, and within a chunk in blocks that a processor's cache holds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lfm.models.headless import Headless
from lfm.train.headed import Best
from lfm.train.losses import Divergence, complete

BLOCK = 2**20
"""Bytes of logits that a processor works on at once: each is read and written several times. An accelerator takes a
chunk whole."""

WORDS = 512
"""Words of the vocabulary that a processor multiplies at once. All 50 257 of them in one product took 1.5 to 2 times as
long (80 to 192 rows of width 64 to 768, one thread, MKL)."""


class Setting(NamedTuple):
    alpha: float
    temperature: float
    kind: Divergence
    beta: float
    room: int


class Swept(torch.autograd.Function):
    """The mean loss; gradients are made with it, and wait for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Tensor | Best | Headless,
        labels: Tensor | None,
        setting: Setting,
        wants: tuple[bool, bool, bool],
    ) -> Tensor:
        loss, ctx.gradients = swept(Headless(hidden, weight, bias), teacher, labels, setting, wants)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        waiting, ctx.gradients = ctx.gradients, None
        assert waiting is not None, "a backward pass for each loss: its gradients are given away"
        return *(None if g is None else g.mul_(gradient) for g in waiting), None, None, None, None


def swept(
    student: Headless,
    teacher: Tensor | Best | Headless,
    labels: Tensor | None,
    setting: Setting,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """The mean loss, and its gradients with respect to hidden states, weight and bias where they are wanted."""
    hidden, weight, bias = student
    count, vocabulary = len(hidden), len(weight)
    exact = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    kind = hidden.device.type
    narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    # a scaler comes after these products, and fp16 loses what is below 6e-8
    narrow = exact if exact == torch.float64 or narrow == torch.float16 else narrow
    rows = min(max(1, setting.room // (exact.itemsize * vocabulary)), max(count, 1))
    rows = math.ceil(count / math.ceil(count / rows)) if count else 1  # chunks of one size, or nearly
    block = max(1, BLOCK // (exact.itemsize * vocabulary)) if kind == "cpu" else rows
    buffer = torch.empty(rows, vocabulary, dtype=exact, device=hidden.device)
    theirs = None
    if isinstance(teacher, Headless):
        theirs = torch.empty(rows, len(teacher.weight), dtype=exact, device=hidden.device)
    to_hidden = torch.zeros(hidden.shape, dtype=exact, device=hidden.device) if wants[0] else None
    to_weight = torch.zeros(weight.shape, dtype=exact, device=hidden.device) if wants[1] else None
    to_bias = torch.zeros(vocabulary, dtype=exact, device=hidden.device) if wants[2] else None
    total = torch.zeros((), dtype=exact, device=hidden.device)
    with torch.autocast(kind, enabled=False):
        weight = weight.to(narrow)
        for first in range(0, count, rows):
            part = slice(first, min(first + rows, count))
            read = hidden[part].to(narrow)
            logits = _through(read, weight, bias, buffer[: len(read)])
            told = _told(teacher, part, theirs)
            for at in range(0, len(read), block):
                some = slice(at, min(at + block, len(read)))
                wanted = None if labels is None else labels[part][some, None]
                total += _turned(logits[some], _some(told, some), wanted, setting)
            if to_hidden is not None:
                to_hidden[part] = (logits.to(narrow) @ weight).to(exact).div_(count)
            if to_weight is not None:
                _add(to_weight, logits, read, 1 / count)
            if to_bias is not None:
                to_bias.add_(logits.sum(0), alpha=1 / count)
    given = [to_hidden, to_weight, to_bias]
    return total / max(count, 1), [None if g is None or p is None else g.to(p.dtype) for g, p in zip(given, student)]


def _through(read: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Logits (n, V) of hidden states (n, d), written into `out`."""
    if read.dtype == out.dtype:
        step = WORDS if out.device.type == "cpu" else len(weight)
        for at in range(0, len(weight), step):
            torch.mm(read, weight[at : at + step].T, out=out[:, at : at + step])
    else:
        out.copy_(read @ weight.T)
    return out if bias is None else out.add_(bias)


def _add(sum: Tensor, slope: Tensor, read: Tensor, share: float) -> None:
    """sum (V, d) += share · slopeᵀ (V, n) · read (n, d)."""
    if read.dtype == sum.dtype or sum.device.type == "cpu":
        sum.addmm_(slope.T, read.to(sum.dtype), alpha=share)
    else:  # an accelerator is much quicker at narrow products
        sum.add_(slope.to(read.dtype).T @ read, alpha=share)


def _told(teacher: Tensor | Best | Headless, part: slice, out: Tensor | None) -> Tensor | Best:
    """What the teacher tells of a chunk: logits or log-probabilities (n, V), or its best answers."""
    if isinstance(teacher, Best):
        return Best(teacher.ids[part], teacher.logprobs[part])
    if isinstance(teacher, Headless):
        assert out is not None
        read = teacher.hidden[part].to(teacher.weight.dtype)
        return _through(read, teacher.weight, teacher.bias, out[: len(read)])
    return teacher[part]


def _some(told: Tensor | Best, some: slice) -> Tensor | Best:
    return Best(told.ids[some], told.logprobs[some]) if isinstance(told, Best) else told[some]


def _turned(x: Tensor, told: Tensor | Best, labels: Tensor | None, setting: Setting) -> Tensor:
    """The summed loss of a block of logits (n, V), which become its gradient where they lie. labels: (n, 1)."""
    alpha, temperature, kind, beta, _ = setting
    if isinstance(told, Best):
        if temperature == 1 and kind == "forward":
            return _outcomes(x, told, labels, alpha)
        told = complete(told.ids, told.logprobs.to(x.dtype), x.shape[-1])
    hard, slope = None, x
    if alpha < 1:
        assert labels is not None
        logp = torch.log_softmax(x, -1)
        hard = logp.gather(-1, labels).sum() * -(1 - alpha)
        slope = logp.exp_().mul_(1 - alpha)
        slope.scatter_add_(-1, labels, slope.new_full(labels.shape, alpha - 1))
    width = min(x.shape[-1], told.shape[-1])
    s = torch.log_softmax(x[:, :width] / temperature if temperature != 1 else x[:, :width], -1)
    t = told[:, :width].to(x.dtype)
    t = torch.log_softmax(t / temperature if temperature != 1 else t, -1)
    apart = _slope(s, t, kind, beta, x[:, :width])
    x[:, :width].mul_(alpha * temperature)
    x[:, width:] = 0
    soft = apart.sum() * (alpha * temperature**2)
    if hard is None:
        return soft
    x.add_(slope)
    return soft + hard


def _slope(s: Tensor, t: Tensor, kind: Divergence, beta: float, out: Tensor) -> Tensor:
    """D of log-probabilities, a number a row; its gradient with respect to the student's logits goes into `out`.

    forward: q − p. reverse: q (log q/p − D). jsd: (1 − β) q (log q/m − KL(q ‖ m)). s and t are written over.
    """
    if kind == "forward":
        mass = t.exp()
        least = torch.finfo(s.dtype).min / 4  # of a word that cannot be, 0 · (−∞) is to be 0
        t.clamp_(min=least).sub_(s.clamp_(min=least)).mul_(mass)
        torch.sub(s.exp_(), mass, out=out)
        return t.sum(-1)
    mass = s.exp()
    if kind == "reverse":
        s.sub_(t).masked_fill_(mass == 0, 0)
        apart = (mass * s).sum(-1)
        torch.mul(s.sub_(apart[:, None]), mass, out=out)
        return apart
    middle = torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))
    s.sub_(middle).masked_fill_(mass == 0, 0)
    ours = (mass * s).sum(-1)
    theirs = t.exp()
    theirs = t.sub_(middle).mul_(theirs).masked_fill_(theirs == 0, 0).sum(-1)
    torch.mul(s.sub_(ours[:, None]), mass, out=out).mul_(1 - beta)
    return beta * theirs + (1 - beta) * ours


def _outcomes(x: Tensor, told: Best, labels: Tensor | None, alpha: float) -> Tensor:
    """Forward KL over k + 1 outcomes, and cross-entropy: both are softmax less few numbers, so that one array serves.

    With τ the student's probability of the rest, r the teacher's: the gradient is q − p at the k best, and q (1 − r/τ)
    elsewhere.
    """
    ids, logp = told.ids, told.logprobs.to(x.dtype)
    p = logp.exp()
    known = p.sum(-1, keepdim=True)
    rest = 1 - known.clamp(max=1 - 1e-7)
    best, top = x.gather(-1, ids), x.amax(-1, keepdim=True)
    right = None if labels is None else x.gather(-1, labels)
    x.sub_(top).exp_()
    mass = x.gather(-1, ids)
    x.scatter_(-1, ids, 0.0)
    tail = x.sum(-1, keepdim=True)
    whole = tail + mass.sum(-1, keepdim=True)
    log_whole = top + whole.log()
    apart = torch.where(p > 0, p * (logp - best + log_whole), 0.0).sum(-1, keepdim=True)
    share = (alpha * (known + rest) + 1 - alpha) / whole  # of softmax in the gradient
    if ids.shape[-1] < x.shape[-1]:
        tail = tail.clamp(min=torch.finfo(x.dtype).tiny)
        apart += rest * (rest.log() - tail.log() + whole.log())
        x.mul_(share - alpha * rest / tail)
    else:
        share = (alpha * known + 1 - alpha) / whole
    x.scatter_(-1, ids, share * mass - alpha * p)
    if alpha == 1:
        return apart.sum()
    assert labels is not None and right is not None
    x.scatter_add_(-1, labels, x.new_full(labels.shape, alpha - 1))
    return alpha * apart.sum() + (1 - alpha) * (log_whole - right).sum()
