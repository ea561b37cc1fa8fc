"""What a teacher tells of a batch, laid beside it, and how far a student is from that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lfm.train.losses import Divergence, complete, kd, kd_topk

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.model import Batch

TOLD = "teacher"
"""The name in a batch of what a teacher tells of its N scored places: logits (N, V); log-probabilities beside IDS."""
IDS = "teacher.ids"
"""The name of its k likeliest tokens or classes (N, k), where it tells no others; TOLD is then (N, k), and the
probability that it leaves out is of all others together."""


def gap(logits: Tensor, batch: Batch, temperature: float = 1.0, kind: Divergence = "forward") -> Tensor:
    """T² · D between a student's logits (N, V) and what was told of the same places: a mean over them, a scalar.

    Of the k likeliest alone D is over k + 1 outcomes, or, with another temperature or divergence, over the answers that
    spread what was left out evenly.
    """
    theirs = batch[TOLD]
    if IDS in batch:
        ids = batch[IDS]
        if temperature == 1 and kind == "forward":
            return kd_topk(logits, ids, theirs)
        return kd(logits, complete(ids, theirs, logits.shape[-1]), temperature, kind)
    width = min(logits.shape[-1], theirs.shape[-1])  # a vocabulary may be padded to a round number
    return kd(logits[:, :width], theirs[:, :width], temperature, kind)
