"""Few-shot tasks drawn from records: N classes under new numbers, or one group of records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from lfm.core.errors import DataError, MismatchError
from lfm.core.heavy import F, torch
from lfm.core.interfaces import Codec
from lfm.core.model import Model
from lfm.data import task as tasks
from lfm.models import forward
from lfm.train.batches import once

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch


class Pool(NamedTuple):
    """Records by number under their class (ways > 0) or group, how to batch them, and what is lost on a batch."""

    members: Mapping[str, Sequence[int]]
    ways: int  # classes a task; 0: a task is one group
    collate: Callable[[Sequence[int]], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]

    @property
    def keys(self) -> int:
        """How many of its members one task takes."""
        return max(self.ways, 1)


def pool(records: Sequence[Any], model: Model, ways: int, *, least: int) -> Pool:
    """The records of the classes, or groups, that have `least` of them.

    A classifier's tasks use the first `ways` outputs of its head. MismatchError where it has fewer; DataError where too
    few classes or groups are left.
    """
    if ways > len(model.facts.labels):
        raise MismatchError(
            f"{ways} ways need a head of {ways} classes",
            why=f"{model.ref} has {len(model.facts.labels)}",
            fix=f"ways={len(model.facts.labels)}, or a model with a wider head",
        )
    members: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        within = f"{record.group}/" if record.group else ""
        members.setdefault(within + record.label if ways else record.group, []).append(number)
    enough = {key: numbers for key, numbers in members.items() if len(numbers) >= least}
    if len(enough) < max(ways, 1):
        kind = "classes" if ways else "groups"
        raise DataError(
            f"a task needs {max(ways, 1)} {kind} of {least} examples or more, {len(enough)} have as many",
            why=f"the {kind}: {', '.join(f'{key} ({len(n)})' for key, n in list(members.items())[:8])}",
            fix="give more examples, or ask for fewer ways or shots",
        )
    if ways:  # which number a class goes by is drawn with each task
        records = [msgspec.structs.replace(record, label=model.facts.labels[0]) for record in records]
    task = tasks.task_for(records, model.ask(Codec), model.facts)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        logits = forward(module, batch)
        if not ways:
            return task.loss(logits, batch)
        return F.cross_entropy(logits[:, :ways], batch["labels"].to(logits.device))

    return Pool(enough, ways, once(records, task.collate)[1], loss)


Examples = Sequence[tuple[int, int]]
"""Records by number, each with the class it goes by in this task."""


def draw(given: Pool, count: int, random: torch.Generator) -> Examples:
    """A task: up to `count` examples of each class (or of the group), in turn: the first n · ways hold n of each."""
    keys = list(given.members)
    rows: list[list[tuple[int, int]]] = []
    for place, key in enumerate(torch.randperm(len(keys), generator=random)[: given.keys].tolist()):
        numbers = given.members[keys[key]]
        chosen = torch.randperm(len(numbers), generator=random)[:count].tolist()
        rows.append([(numbers[i], place) for i in chosen])
    return [row[i] for i in range(max(map(len, rows))) for row in rows if i < len(row)]


def batch_of(given: Pool, examples: Examples) -> Batch:
    """The examples as a batch, under the classes they go by."""
    batch = dict(given.collate([number for number, _ in examples]))
    return batch | ({"labels": torch.tensor([place for _, place in examples])} if given.ways else {})


def sample(given: Pool, count: int, shots: int, steps: int, size: int, random: torch.Generator) -> Batch:
    """`count` tasks: tensors (count, steps, size, …). Each goes through its shots in shuffled rounds."""
    chosen: list[tuple[int, int]] = []
    for _ in range(count):
        examples = draw(given, shots, random)
        rounds: list[int] = []
        while len(rounds) < steps * size:
            rounds += torch.randperm(len(examples), generator=random).tolist()
        chosen += [examples[i] for i in rounds[: steps * size]]
    batch = batch_of(given, chosen)
    return {name: tensor.reshape(count, steps, size, *tensor.shape[1:]) for name, tensor in batch.items()}
