"""Several models at one batch: what each of them reads of the same records, and what each tells of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from lfm.core import Codec, Model, Run
from lfm.data import task as tasks
from lfm.data.records import Record
from lfm.data.shares import classless
from lfm.distilling import lesson as lessons
from lfm.distilling.lesson import Lesson
from lfm.distilling.telling import IDS, TOLD
from lfm.train import once

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch


def placed(name: str, place: int) -> str:
    """The name in a batch of what is the model's at that place; the first model's are the batch's own."""
    return f"{name}.{place}" if place else name


def told_by_all(taught: Sequence[Lesson], teachers: Sequence[Model], run: Run) -> Callable[[Sequence[int]], Batch]:
    """Numbers → the student's batch, with what each teacher tells of that very batch beside it (see `told_by`).

    taught: one lesson a teacher, all of the same records and student. Words that are hidden by chance are so for all.
    """
    now: list[Batch] = []
    read = taught[0].collate

    def same(chosen: Sequence[int]) -> Batch:
        return now[0] if now else read(chosen)  # before the first batch: what a teacher is asked beforehand

    asked = [
        lessons.told(replace(one, collate=same), teacher, run, placed("teacher", place))
        for place, (one, teacher) in enumerate(zip(taught, teachers, strict=True))
    ]

    def collate(chosen: Sequence[int]) -> Batch:
        now[:] = [read(chosen)]
        batch = dict(now[0])
        for place, ask in enumerate(asked):
            heard = ask(chosen)
            batch |= {placed(name, place): heard[name] for name in (TOLD, IDS) if name in heard}
        return batch

    return collate


def told_by(batch: Batch, place: int) -> Batch:
    """What one of the teachers told: TOLD, and IDS where it told the k likeliest alone."""
    return {name: batch[placed(name, place)] for name in (TOLD, IDS) if placed(name, place) in batch}


def read_by_all(read: Sequence[Lesson]) -> Callable[[Sequence[int]], Batch]:
    """Numbers → a batch that holds what each of the models reads (see `read_by`).

    read: one lesson a model, with that model in the place of the teacher, and the first in the student's.
    """

    def collate(chosen: Sequence[int]) -> Batch:
        batch = dict(read[0].collate(chosen))
        for place, one in enumerate(read):
            if place and one.order:  # language models of one vocabulary read the same
                batch |= {placed(name, place): tensor for name, tensor in one.theirs(chosen).items()}
        return batch

    return collate


def read_by(batch: Batch, place: int, read: Sequence[Lesson]) -> Batch:
    """What one of the models reads."""
    if not place or not read[place].order:
        return batch
    end = placed("", place)
    return {name.removesuffix(end): tensor for name, tensor in batch.items() if name.endswith(end)}


def answer(logits: Tensor, one: Lesson) -> Tensor:
    """A model's logits with the classes in the first model's order."""
    return logits[:, list(one.order)] if one.order else logits


def paired(records: Sequence[Record], seen: Sequence[Record], teacher: Model, student: Model) -> Lesson:
    """A lesson of two classifiers that read different records of the same things, one for one.

    What the teacher reads needs no classes. It tells of those of its classes that the student has too, in the student's
    order.
    """
    codec = student.ask(Codec)
    task = tasks.task_for(records, codec, student.facts)
    numbers, collate = once(records, task.collate)
    nameless = classless([_unlabelled(record) for record in seen], teacher)
    own = tasks.task_for(nameless, teacher.ask(Codec), teacher.facts)
    order = [teacher.facts.labels.index(name) for name in student.facts.labels if name in teacher.facts.labels]
    return Lesson(records, numbers, task, collate, lambda chosen: own.collate([nameless[i] for i in chosen]), order)


def _unlabelled(record: Record) -> Record:
    return msgspec.structs.replace(record, label="")  # type: ignore[call-arg]
