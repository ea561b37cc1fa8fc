"""What a teacher tells of a batch, laid beside it, and how far a student is from that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lfm.core.heavy import F, torch
from lfm.models import forward
from lfm.models.headless import Headless, headless
from lfm.train.headed import Best, headed
from lfm.train.losses import Divergence, complete, kd, kd_topk

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from lfm.core.interfaces import Batch
    from lfm.distilling.lesson import Lesson

TOLD = "teacher"
"""The name in a batch of what a teacher tells of its N scored places: logits (N, V); log-probabilities beside IDS."""
IDS = "teacher.ids"
"""The name of its k likeliest tokens or classes (N, k), where it tells no others; TOLD is then (N, k), and the
probability that it leaves out is of all others together."""
HEAD, BIAS = "teacher.head", "teacher.bias"
"""The names of its head's weight (V, d) and bias (V,), where it tells what that reads: TOLD is then (N, d)."""


def gap(
    logits: Tensor, batch: Batch, temperature: float = 1.0, kind: Divergence = "forward", beta: float = 0.5
) -> Tensor:
    """T² · D between a student's logits (N, V) and what was told of the same places: a mean over them, a scalar.

    Of the k likeliest alone D is over k + 1 outcomes, or, with another temperature or divergence, over the answers that
    spread what was left out evenly. 0 where there are no places.
    """
    theirs = batch[TOLD]
    if not len(logits):
        return logits.float().sum()
    if IDS in batch:
        ids = batch[IDS]
        if temperature == 1 and kind == "forward":
            return kd_topk(logits, ids, theirs)
        return kd(logits, complete(ids, theirs, logits.shape[-1]), temperature, kind, beta)
    width = min(logits.shape[-1], theirs.shape[-1])  # a vocabulary may be padded to a round number
    return kd(logits[:, :width], theirs[:, :width], temperature, kind, beta)


def hard(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (N, V) and what is right (N,), a mean over places, a scalar; 0 where there are none."""
    return F.cross_entropy(logits, labels) if len(labels) else logits.float().sum()


def weighed(logits: Tensor, labels: Tensor, alpha: float, soft: Tensor) -> Tensor:
    """(1 − α) CE(y, p) + α · soft, a scalar. With α = 1 labels are not read."""
    return soft if alpha == 1 else (1 - alpha) * hard(logits, labels) + alpha * soft


def heard(batch: Batch, rows: slice = slice(None)) -> Tensor:
    """A teacher's logits (n, V) at some of the N places of which it tells more than its likeliest answers."""
    told = batch[TOLD][rows]
    if HEAD not in batch:
        return told
    with torch.autocast(told.device.type, enabled=False):  # as precise as the teacher's own head is
        return F.linear(told.to(batch[HEAD].dtype), batch[HEAD], batch.get(BIAS))


def scoring(lesson: Lesson, module: nn.Module) -> Callable[[nn.Module, Batch], tuple[Headless | Tensor, Tensor]]:
    """(module or a copy of it, batch) → what answers the N places that the task scores, and their labels (N,).

    Of a language model whose head is a plain linear layer that ends in the logits, what the head reads, and the head;
    else logits (N, V).
    """
    batch = lesson.collate(lesson.numbers[:1])
    body = headless(module, batch) if batch["labels"].ndim == 2 else None

    def answered(module: nn.Module, batch: Batch) -> tuple[Headless | Tensor, Tensor]:
        if body is None:
            return lesson.task.scored(forward(module, batch), batch)
        answering = body(module, batch)
        # what is scored of hidden states is what is scored of the logits that they would give
        hidden, labels = lesson.task.scored(answering.hidden, batch)
        return answering._replace(hidden=hidden), labels

    return answered


def taught(
    lesson: Lesson,
    module: nn.Module,
    alpha: float,
    temperature: float = 1.0,
    kind: Divergence = "forward",
    beta: float = 0.5,
) -> Callable[[nn.Module, Batch], Tensor]:
    """(module or a copy of it, batch) → (1 − α) CE(y, p) + α T² D, the mean over what the task scores, a scalar.

    A language model's head reads only the places that are scored, a few at a time, where it is a plain linear layer
    that ends in the logits: these are then never whole (`headed`), and neither are those of a teacher that tells HEAD.
    With α = 0 nothing of the teacher is read.
    """
    answered = scoring(lesson, module)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        student, labels = answered(module, batch)
        if alpha == 0:
            if not isinstance(student, Headless):
                return hard(student, labels)
            alone = labels[:, None]  # what has no weight
            return headed(student, Best(alone, torch.zeros_like(alone, dtype=torch.float32)), labels, alpha=0.0)
        theirs = batch[TOLD]
        if isinstance(student, Headless):
            teacher = Best(batch[IDS], theirs) if IDS in batch else theirs
            teacher = Headless(theirs, batch[HEAD], batch.get(BIAS)) if HEAD in batch else teacher
            how: Any = {"alpha": alpha, "temperature": temperature, "kind": kind, "beta": beta}
            return headed(student, teacher, labels, **how)
        soft = gap(student, {**batch, TOLD: heard(batch)}, temperature, kind, beta)
        return weighed(student, labels, alpha, soft)

    return loss
