"""What a student is taught from: records as it reads them, as its teacher reads them, and what that one tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import msgspec

from lfm.core import Codec, Logits, Model, Run
from lfm.core.errors import ConfigError, MismatchError
from lfm.core.heavy import torch
from lfm.data import task as tasks
from lfm.data.records import Record
from lfm.distilling.telling import TOLD
from lfm.train import once

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.model import Batch

LIMIT = 2**28
"""Bytes of a teacher's answers that are kept."""


@final
@dataclass(frozen=True)
class Lesson:
    """Records by number. task: the student's. collate: numbers → its batch. theirs: numbers → the teacher's batch,
    which is the student's where both are language models (of one vocabulary). order: the teacher's classes, by number,
    in the student's order; empty for language models."""

    records: Sequence[Record]
    numbers: Sequence[int]
    task: tasks.Task
    collate: Callable[[Sequence[int]], Batch]
    theirs: Callable[[Sequence[int]], Batch]
    order: Sequence[int]


def lesson(records: Sequence[Record], teacher: Model, student: Model) -> Lesson:
    """Long texts are split to the student's context. DataError where the records set the student no task."""
    codec = student.ask(Codec)
    read = tasks.fit(records, codec, student.facts)
    task = tasks.task_for(read, codec, student.facts)
    numbers, collate = once(read, task.collate)
    if student.facts.task in tasks.LANGUAGE:
        return Lesson(read, numbers, task, collate, collate, ())
    own = tasks.task_for(read, teacher.ask(Codec), teacher.facts)
    order = [teacher.facts.labels.index(name) for name in student.facts.labels]
    return Lesson(read, numbers, task, collate, lambda chosen: own.collate([read[i] for i in chosen]), order)


def told(taught: Lesson, teacher: Model, run: Run, name: str = "teacher") -> Callable[[Sequence[int]], Batch]:
    """Numbers → the student's batch with what the teacher tells beside it. name: of what is kept of it, in the run.

    A classifying teacher is asked once a record, and its answers (records, classes) are kept, up to 256 MB.
    """
    ask = teacher.ask(Logits).logits
    if not taught.order:

        def asked_anew(chosen: Sequence[int]) -> Batch:
            batch = taught.collate(chosen)
            # cloned: what is inferred takes no part in a gradient
            return {**batch, TOLD: taught.task.scored(ask(batch), batch)[0].clone()}

        return asked_anew

    def asked(chosen: Sequence[int]) -> Tensor:
        return ask(taught.theirs(chosen)).cpu()[:, list(taught.order)].clone()

    if 4 * len(taught.records) * len(taught.order) > LIMIT:
        return lambda chosen: {**taught.collate(chosen), TOLD: asked(chosen)}
    parts = [taught.numbers[i : i + 64] for i in range(0, len(taught.records), 64)]
    kept = run.step(name, lambda: torch.cat([asked(part) for part in run.track(parts, name)]))
    return lambda chosen: {**taught.collate(chosen), TOLD: kept[list(chosen)]}


def classed(records: Sequence[Any], student: Model, *, unread: bool) -> Sequence[Any]:
    """Records without a class get any class where classes are left unread; else ConfigError."""
    if all(getattr(record, "label", "none asked") for record in records):
        return records
    if not unread:
        raise ConfigError("records have no class", why="alpha < 1 also learns from classes", fix="alpha=1")
    any_class = student.facts.labels[0]
    return [r if r.label else msgspec.structs.replace(r, label=any_class) for r in records]


def agree(teacher: Model, student: Model) -> None:
    """That one answers what the other does: one task, and the same vocabulary or classes. MismatchError."""
    t, s = teacher.facts, student.facts
    if t.task != s.task:
        raise MismatchError(
            f"a {s.task or 'model without a task'} cannot learn the answers of a {t.task or 'model without a task'}",
            why=f"{student.ref} and {teacher.ref} answer different questions",
        )
    if s.task in tasks.LANGUAGE:
        if t.vocabulary_digest != s.vocabulary_digest and _vocabulary(teacher) != _vocabulary(student):
            raise MismatchError(
                "teacher and student have different vocabularies",
                why=f"{teacher.ref} has {t.vocabulary} tokens, {student.ref} {s.vocabulary}",
                fix="give a student that was made with the teacher's tokenizer",
            )
    elif set(t.labels) != set(s.labels) or not s.labels:
        shown = ["; ".join(labels[:5]) or "none" for labels in (t.labels, s.labels)]
        raise MismatchError(
            "teacher and student have different classes",
            why=f"the teacher's: {shown[0]}; the student's: {shown[1]}",
            fix="rename the classes in one config (id2label)",
        )


def _vocabulary(model: Model) -> dict[str, int]:
    return model.ask(Codec).tokenizer.get_vocab()
