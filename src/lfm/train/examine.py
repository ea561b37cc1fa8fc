"""Held-out records, ready to be put to one candidate after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from lfm.core.heavy import F, torch
from lfm.core.model import Codec, Model
from lfm.data import task as tasks
from lfm.data.records import Record
from lfm.train.batches import once

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.model import Batch

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
