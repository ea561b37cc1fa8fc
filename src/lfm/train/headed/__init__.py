"""What a student loses against its teacher, through its head: logits, divergence and gradient a few rows at a time.

    L = mean over N places of  (1 − α) CE(y, p) + α T² D(pᵗ_T, p_T),   p_T = softmax((h Wᵀ + b) / T)

Autograd keeps several numbers for each place and word of the vocabulary until the backward pass. Here a few places'
logits are made in one buffer, turned into their own gradient where they lie, and multiplied into the gradients of h, W
and b at once (the order of work of Liger's chunked losses, 2410.10989, and of cut cross entropy, 2411.09009, without
compiled kernels and without leaving small gradients out).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from lfm.core.heavy import F, torch
from lfm.models.headless import Headless
from lfm.train.losses import Divergence

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Best", "headed", "rowwise"]

ROOM = {"cpu": 2**24, "cuda": 2**28}
"""Bytes of a chunk's logits, by kind of device; a CPU works on `BLOCK` of them at once, a GPU on all."""


class Best(NamedTuple):
    """A teacher's k likeliest answers (N, k), each once; what their probabilities leave is of all others together."""

    ids: Tensor
    logprobs: Tensor


def headed(
    student: Headless,
    teacher: Tensor | Best | Headless,
    labels: Tensor | None = None,
    *,
    alpha: float = 1.0,
    temperature: float = 1.0,
    kind: Divergence = "forward",
    beta: float = 0.5,
    room: int = 0,
) -> Tensor:
    """The loss above, a scalar; its gradient reaches the student's hidden states, weight and bias.

    student: of N places, (N, d). teacher: its logits (N, V), its best answers, or its own hidden states and head. Where
    one vocabulary is longer (padded to a round number) only what both have is compared. Of best answers D is that of
    `kd_topk` at T = 1 forward, else that of `kd` to what `complete` makes of them. labels: (N,), read where α < 1.
    beta: of `jsd`, between 0 and 1. room: bytes of the logits that there are at once; 0: as the device suits. Sums are
    fp32, or fp64 where the weights are. The backward pass can be done once. Zero where there are no places.
    """
    from lfm.train.headed.modules import Setting, Swept

    assert alpha == 1 or labels is not None, "labels are read where alpha < 1"
    wants = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in student)
    room = room or ROOM.get(student.hidden.device.type, ROOM["cpu"])
    setting = Setting(alpha, temperature, kind, beta, room)
    return Swept.apply(*student, teacher, labels, setting, wants)  # type: ignore[return-value]


def rowwise(student: Headless | Tensor, measure: Callable[[Tensor, slice], Tensor], *, room: int = 0) -> Tensor:
    """What is measured of each of N rows of logits, (N, …): measure(logits (n, V), which rows) → (n, …).

    For losses that `headed` does not take, since their rows hang together: by a reward, or a span. The logits of a head
    are made a few rows at a time, and made again in the backward pass; those that are there anyway (N, V) are measured
    as they are. At least fp32. room: as in `headed`.
    """
    if isinstance(student, torch.Tensor):
        return measure(_wide(student), slice(0, len(student)))
    from torch.utils.checkpoint import checkpoint

    hidden, weight, bias = student
    rows = max(1, (room or ROOM.get(hidden.device.type, ROOM["cpu"])) // (4 * len(weight)))
    parts = [slice(first, min(first + rows, len(hidden))) for first in range(0, max(len(hidden), 1), rows)]

    def measured(read: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
        return measure(_wide(F.linear(read.to(weight.dtype), weight, bias)), part)

    again = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in student)
    if not again:
        return torch.cat([measured(hidden[part], weight, bias, part) for part in parts])
    how = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(measured, hidden[part], weight, bias, part, **how) for part in parts])  # type: ignore[arg-type]


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
