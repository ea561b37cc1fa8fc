"""Held-out records, ready to be put to one candidate after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from lfm.core.heavy import F, torch
from lfm.core.interfaces import Codec, Logits
from lfm.core.model import Model
from lfm.data import task as tasks
from lfm.data.records import Record, Text
from lfm.train.batches import once

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch

Criterion = Literal["accuracy", "loss"]


class Score(NamedTuple):
    """accuracy: share of the scored answers (classes, or tokens) that are right. loss: mean cross-entropy, in nats."""

    accuracy: float
    loss: float

    def beats(self, other: Score, by: Criterion) -> bool:
        """Strictly better; of equal accuracies the one with the lower loss is."""
        if by == "loss":
            return self.loss < other.loss
        return (self.accuracy, -self.loss) > (other.accuracy, -other.loss)


class Marks(NamedTuple):
    """By record, a long text's pieces each for itself. right: 1 where all that was scored of it is told right, else 0;
    of running text the share of its tokens. loss: its mean cross-entropy, in nats."""

    right: list[float]
    loss: list[float]


def marked(records: Sequence[Record], model: Model, batch_size: int = 64) -> Marks:
    """How the model does on each record. DataError where they set it no task."""
    codec, logits = model.ask(Codec), model.ask(Logits).logits
    fitted = tasks.fit(records, codec, model.facts)
    task = tasks.task_for(fitted, codec, model.facts)
    running = isinstance(fitted[0], Text)
    told = Marks([], [])
    for start in range(0, len(fitted), batch_size):
        batch = task.collate(fitted[start : start + batch_size])
        with torch.no_grad():
            scored, labels = task.scored(logits(batch), batch)
            losses = F.cross_entropy(scored, labels, reduction="none").double()
            right = (scored.argmax(-1) == labels).double()
        each = counts(batch["labels"], len(labels))
        for hits, loss in zip(right.split(each), losses.split(each), strict=True):
            told.right.append(float(hits.mean() if running else hits.min()) if len(hits) else 0.0)
            told.loss.append(float(loss.mean()) if len(loss) else 0.0)
    return told


def counts(labels: Tensor, scored: int) -> list[int]:
    """How many of `scored` positions each row of labels (B,) or (B, T) has: all that are not −100, or all but a row's
    first, which a causal model is not asked for."""
    if labels.dim() == 1:
        assert len(labels) == scored, "a task whose scored positions are not its labels"
        return [1] * scored
    whole = (labels != -100).sum(1)
    if int(whole.sum()) != scored:
        whole = (labels[:, 1:] != -100).sum(1)
    assert int(whole.sum()) == scored, "a task whose scored positions are not its labels"
    return whole.tolist()


def examiner(
    records: Sequence[Record], model: Model, batch_size: int = 64
) -> Callable[[Callable[[Batch], Tensor]], Score]:
    """A function from a forward pass (batch → logits) to its score on the records, read as this model reads them.

    DataError where the records set the model no task.
    """
    codec = model.ask(Codec)
    fitted = tasks.fit(records, codec, model.facts)
    task = tasks.task_for(fitted, codec, model.facts)
    numbers, collate = once(fitted, task.collate)

    def examine(logits: Callable[[Batch], Tensor]) -> Score:
        right = count = 0
        loss = 0.0
        for start in range(0, len(numbers), batch_size):
            batch = collate(numbers[start : start + batch_size])
            with torch.no_grad():
                scored, labels = task.scored(logits(batch), batch)
                right += int((scored.argmax(-1) == labels).sum())
                loss += float(F.cross_entropy(scored, labels, reduction="sum").double())
            count += len(labels)
        return Score(right / max(count, 1), loss / max(count, 1))

    return examine
