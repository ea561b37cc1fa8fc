"""Several records in one row of a batch, so that little of it is padding, and none of them sees another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lfm.core.errors import DataError, MismatchError
from lfm.core.heavy import torch
from lfm.core.interfaces import Batch, Codec
from lfm.core.model import Facts, Model
from lfm.data import task as tasks
from lfm.data.files import where
from lfm.data.records import Chat, Record, Text
from lfm.data.suited import SPECIAL
from lfm.data.wording import wording

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
CLOSE = 1e-3
"""Of the logits' own size: by how much packing may change them, by other sums alone."""


class Packed(NamedTuple):
    """rows: the records of each, by number. collate: rows → a batch. filled: the share of it that is not padding."""

    rows: Sequence[tuple[int, ...]]
    collate: Callable[[Sequence[tuple[int, ...]]], Batch]
    filled: float


def packed(records: Sequence[Record], collate: Callable[[Sequence[Record]], Batch], facts: Facts, room: int) -> Packed:
    """The records in as few rows of `room` tokens as first-fit by falling length finds.

    The batch has position_ids that begin at 0 with each record, and an additive attention_mask (B, 1, T, T) that lets a
    token see those of its own record up to itself; its labels are the records' own. MismatchError for models that do
    not read from left to right; DataError where a record does not fit.
    """
    packable(facts, room)
    each = [_row(collate([record])) for record in records]
    if (longest := max(len(ids) for ids, _ in each)) > room:
        raise DataError(f"a record of {longest} tokens does not fit a row of {room}", fix=f"pack={longest} or more")
    rows: list[list[int]] = []
    left: list[int] = []
    for number in sorted(range(len(each)), key=lambda i: (-len(each[i][0]), i)):
        size = len(each[number][0])
        place = next((i for i, free in enumerate(left) if free >= size), len(rows))
        if place == len(rows):
            rows.append([])
            left.append(room)
        rows[place].append(number)
        left[place] -= size

    def together(chosen: Sequence[tuple[int, ...]]) -> Batch:
        return _batch([[each[i] for i in row] for row in chosen])

    used = sum(len(ids) for ids, _ in each)
    return Packed([tuple(row) for row in rows], together, used / (len(rows) * room))


def packable(facts: Facts, room: int) -> None:
    """MismatchError for a model that does not read from left to right, or rows that pass its context."""
    if facts.task != "causal-lm":
        raise MismatchError(f"packing is for causal language models, this is {facts.task or 'none'}", fix="pack=0")
    if facts.context and room > facts.context:
        raise MismatchError(f"rows of {room} tokens pass the model's context", fix=f"pack={facts.context} or less")


def roomy(records: Sequence[Record], model: Model, room: int) -> None:
    """DataError naming the first record of more tokens than a row has, and how many the longest takes."""
    codec, facts = model.ask(Codec), model.facts
    task, longest, first = tasks.task_for(records, codec, facts), 0, ""
    for place, record in enumerate(records):
        if _small(record, room):
            continue
        for part in tasks.fit([record], codec, facts):
            size = len(task.collate([part])["input_ids"][0])
            if size > room:
                longest, first = max(longest, size), first or f"{where(records, place)}: {size} tokens"
    if longest:
        raise DataError(f"{first} do not fit a row of {room}", fix=f"pack={longest} or more, or pack=0")


def _small(record: Record, room: int) -> bool:
    """Whether it has so few bytes that it need not be tokenised: no token is less than one."""
    if isinstance(record, Chat):  # of whose template nothing is known
        return False
    text = record.text if isinstance(record, Text) else "".join(wording(record))
    return len(text.encode()) + SPECIAL <= room


def _row(batch: Batch) -> tuple[Tensor, Tensor]:
    """A lone record's ids and labels; its first token's label is nobody's to tell, and not its neighbour's either."""
    labels = batch["labels"][0].clone()
    labels[0] = IGNORED
    return batch["input_ids"][0], labels


def _batch(rows: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Batch:
    length = max(sum(len(ids) for ids, _ in row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels, places = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    owner = torch.full_like(ids, -1)
    for at, row in enumerate(rows):
        first = 0
        for number, (words, told) in enumerate(row):
            last = first + len(words)
            ids[at, first:last], labels[at, first:last] = words, told
            places[at, first:last] = torch.arange(len(words))
            owner[at, first:last] = number
            first = last
    before = torch.arange(length)[:, None] >= torch.arange(length)[None, :]
    seen = (owner[:, :, None] == owner[:, None, :]) & before  # padding sees padding: a row of nothing has no softmax
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {"input_ids": ids, "labels": labels, "position_ids": places, "attention_mask": mask[:, None]}


def held_apart(logits: Callable[[Batch], Tensor], records: Sequence[Record], collate: Callable[..., Batch]) -> None:
    """MismatchError where records of one row do see each other in this model: tried on two of them.

    Models whose state runs along the row, or that know no position_ids or masks of this form, are found so.
    """
    two = [_row(collate([record])) for record in records[:2]]
    if len(two) < 2:
        return
    whole = logits(_batch([two]))[0]
    first = 0
    for ids, label in two:
        alone = logits(_batch([[(ids, label)]]))[0]
        beside = whole[first : first + len(ids)]
        if not bool((alone - beside).abs().max() <= CLOSE * alone.abs().max()):
            raise MismatchError(
                "records packed into one row would see each other in this model",
                why="its answers about a record change with the one before it",
                fix="pack=0",
            )
        first += len(ids)
