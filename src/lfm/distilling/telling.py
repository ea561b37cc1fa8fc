"""What a teacher tells of a batch, laid beside it, and how far a student is from that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lfm.train.losses import Divergence, kd

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.model import Batch

TOLD = "teacher"
"""The name in a batch of what a teacher tells of its N scored places: logits (N, V)."""


def gap(logits: Tensor, batch: Batch, temperature: float = 1.0, kind: Divergence = "forward") -> Tensor:
    """T² · D between a student's logits (N, V) and what was told of the same places: a mean over them, a scalar."""
    theirs = batch[TOLD]
    width = min(logits.shape[-1], theirs.shape[-1])  # a vocabulary may be padded to a round number
    return kd(logits[:, :width], theirs[:, :width], temperature, kind)
