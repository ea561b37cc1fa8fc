"""A task says what records mean: how they become a batch, what is lost on it, and how an answer is read from logits.

A method is written once for all of them: `task = task_for(records, codec, facts)`, then `task.collate(records)` →
`forward(module, batch)` → `task.loss(logits, batch)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from lfm.core.model import Batch, Codec, Facts
from lfm.data.records import Record

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True)
class Task:
    """collate: records → the forward's tensors, plus "labels" ((B,) classes or (B, T) tokens, −100 where not scored).

    loss: (logits, batch) → mean CE over scored positions, fp32 scalar. predict: (logits, batch) → one answer a record.
    scored: (logits, batch) → the (N, V) logits and (N,) labels that the loss is over (a distiller compares these).
    truth: records → the right answers. metric: the headline metric's name (accuracy, perplexity, exact_match).
    """

    name: str
    metric: str
    collate: Callable[[Sequence[Record]], Batch]
    loss: Callable[[Tensor, Batch], Tensor]
    scored: Callable[[Tensor, Batch], tuple[Tensor, Tensor]]
    predict: Callable[[Tensor, Batch], list[str]]
    truth: Callable[[Sequence[Record]], list[str]]


def task_for(records: Sequence[Record], codec: Codec, facts: Facts) -> Task:
    """The task that these records set a model of these facts. DataError where it cannot take it.

    text → language modelling (causal, masked, seq2seq); completion, fact → the continuation (or the blank of a masked
    model); label, pair, image → the head's classes, or for a model with no head the label's words as a continuation.
    """
    raise NotImplementedError
