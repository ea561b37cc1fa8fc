"""Batches: collated once where they can be, and two kinds side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, final, overload

from lfm.core.heavy import torch
from lfm.data.files import Lines, where

if TYPE_CHECKING:
    from lfm.core.interfaces import Batch

R = TypeVar("R")
S = TypeVar("S")

LIMIT = 2**30
"""Bytes that collated records may hold."""
CHUNK = 64


@final
class Numbers(Sequence[int]):
    """Numbers of records, or some of these, that know how users find each of them (see lfm.data.files.where)."""

    def __init__(self, records: Sequence[Any], among: range | None = None) -> None:
        self.records, self._among = records, range(len(records)) if among is None else among

    def __len__(self) -> int:
        return len(self._among)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> Numbers: ...
    def __getitem__(self, place: int | slice) -> int | Numbers:
        return Numbers(self.records, self._among[place]) if isinstance(place, slice) else self._among[place]

    def where(self, place: int) -> str:
        """FILE:LINE of the record whose number stands at this place; its number from 1 where it was read from none."""
        return where(self.records, self[place]) if isinstance(self.records, Lines) else str(self[place] + 1)


def once(
    records: Sequence[R], collate: Callable[[Sequence[R]], Batch], *, limit: int = LIMIT
) -> tuple[Sequence[int], Callable[[Sequence[int]], Batch]]:
    """Record numbers and a collate of them that gives what `collate` gives of the records.

    Records whose tensors are all of one shape (images) are prepared now and afterwards only picked; of others, and past
    `limit` bytes, each batch is collated when it is asked for.
    """
    numbers = Numbers(records)

    def afresh(chosen: Sequence[int]) -> Batch:
        return collate([records[i] for i in chosen])

    first = collate(records[:1])
    size = sum(tensor.nbytes for tensor in first.values()) * len(records)
    if size > limit or any(name.endswith("ids") for name in first):  # token ids: as long as the batch's longest
        return numbers, afresh
    parts = [afresh(numbers[i : i + CHUNK]) for i in range(0, len(records), CHUNK)]
    if any(part[name].shape[1:] != first[name].shape[1:] for part in parts for name in first):
        return numbers, afresh
    whole = {name: torch.cat([part[name] for part in parts]) for name in first}

    def pick(chosen: Sequence[int]) -> Batch:
        index = torch.as_tensor(list(chosen))
        return {name: tensor[index] for name, tensor in whole.items()}

    return numbers, pick


BESIDE = "beside."
"""What the names of a second batch's tensors begin with."""


def beside(
    collate: Callable[[Sequence[R]], Batch], others: Sequence[S], other: Callable[[Sequence[S]], Batch]
) -> Callable[[Sequence[R]], Batch]:
    """A collate that puts beside each batch one of as many `others`, drawn anew each time (each once at most).

    It draws from torch's own generator, which the training loop seeds by step: the same again after a kill.
    """

    def both(records: Sequence[R]) -> Batch:
        drawn = torch.randperm(len(others))[: len(records)].tolist()
        more = other([others[i] for i in drawn])
        return {**collate(records), **{BESIDE + name: tensor for name, tensor in more.items()}}

    return both


def parted(batch: Batch) -> tuple[Batch, Batch]:
    """The two batches of `beside`."""
    own = {name: tensor for name, tensor in batch.items() if not name.startswith(BESIDE)}
    return own, {name.removeprefix(BESIDE): t for name, t in batch.items() if name.startswith(BESIDE)}
