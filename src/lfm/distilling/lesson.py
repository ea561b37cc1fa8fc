"""What a student is taught from: records as it reads them, as its teacher reads them, and what that one tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

from lfm.core import Answers, Codec, Features, Inputs, Logits, Logprobs, Model, Run, Top
from lfm.core.errors import MismatchError
from lfm.core.heavy import np, torch
from lfm.data import task as tasks
from lfm.data.records import Record
from lfm.data.suited import CLASSED, suited
from lfm.distilling import answers, classes
from lfm.distilling.telling import BIAS, HEAD, IDS, TOLD
from lfm.train import once

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch

LIMIT = 2**28
"""Bytes of a teacher's answers that are kept."""

K = 64
"""Tokens that a teacher without logits is asked for at each place; most endpoints tell fewer."""


@final
@dataclass(frozen=True)
class Lesson:
    """Records by number. task: the student's. collate: numbers → its batch. theirs: numbers → the teacher's batch,
    which is the student's where both are language models (of one vocabulary). order: the teacher's classes, by number,
    in the student's order; empty for language models. codec: the student's."""

    records: Sequence[Record]
    numbers: Sequence[int]
    task: tasks.Task
    collate: Callable[[Sequence[int]], Batch]
    theirs: Callable[[Sequence[int]], Batch]
    order: Sequence[int]
    codec: Codec | None = None


def lesson(records: Sequence[Record], teacher: Model, student: Model) -> Lesson:
    """Long texts are split to the student's context. DataError where the records set the student no task."""
    codec = student.ask(Codec)
    read = tasks.fit(records, codec, student.facts)
    task = tasks.task_for(read, codec, student.facts)
    numbers, collate = once(read, task.collate)
    if student.facts.task in tasks.LANGUAGE:
        return Lesson(read, numbers, task, collate, collate, (), codec)
    order = [teacher.facts.labels.index(name) for name in student.facts.labels]
    if not (teacher.can(Logits) or teacher.can(Features)):  # it reads no batch
        return Lesson(read, numbers, task, collate, collate, order, codec)
    own = tasks.task_for(read, teacher.ask(Codec), teacher.facts)
    return Lesson(read, numbers, task, collate, lambda chosen: own.collate([read[i] for i in chosen]), order, codec)


def told(taught: Lesson, teacher: Model, run: Run, name: str = "teacher") -> Callable[[Sequence[int]], Batch]:
    """Numbers → the student's batch with what the teacher tells beside it. name: of what is kept of it, in the run.

    By the most telling access that the teacher gives: logits; answers that were kept; classes; its likeliest tokens, up
    to 64 at each place. A classifying teacher is asked once a record, and its answers (records, classes) are kept, up
    to 256 MB; one that tells tokens is asked once a place, and all of that is kept.
    """
    if not teacher.can(Logits):
        return _likeliest(taught, teacher, run, name)
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
    kept = run.once(name, lambda: torch.cat([asked(part) for part in run.track(parts, name)]))
    return lambda chosen: {**taught.collate(chosen), TOLD: kept[list(chosen)]}


def behind(
    taught: Lesson,
    teacher: Model,
    run: Run,
    name: str = "teacher",
    collate: Callable[[Sequence[int]], Batch] | None = None,
) -> Callable[[Sequence[int]], Batch]:
    """As told; but of a language model in this process what its head reads, and the head (HEAD, BIAS), wherever its
    logits are no more than that: they are then never whole. For losses that know of it (`telling.taught`).

    collate: of batches of another making than the lesson's, of a language model.
    """
    read = replace(taught, collate=collate) if collate else taught
    found = getattr(teacher.ask(Logits), "behind", None) if teacher.can(Logits) and not taught.order else None
    body = found(taught.collate(taught.numbers[:1])) if found else None
    if body is None:
        return told(read, teacher, run, name)

    def asked(chosen: Sequence[int]) -> Batch:
        batch = read.collate(chosen)
        states, weight, bias = body(batch)
        heard = {TOLD: taught.task.scored(states, batch)[0].clone(), HEAD: weight}
        return {**batch, **heard, **({} if bias is None else {BIAS: bias})}

    return asked


def _likeliest(taught: Lesson, teacher: Model, run: Run, name: str) -> Callable[[Sequence[int]], Batch]:
    """As told, of a teacher that gives no logits."""
    if teacher.can(Answers):
        kept, where = teacher.ask(Answers), answers.found(taught, teacher)
        many = len(taught.order) or teacher.facts.vocabulary
        return lambda chosen: {
            **taught.collate(chosen),
            **_laid(taught, many, *kept.told(where[list(chosen)].tolist())),
        }
    ask = answers.asking(taught, teacher, K)
    many = 0
    rows: list[Any] = []
    for first in run.track(range(0, len(taught.records), answers.CHUNK), name):
        chosen = taught.numbers[first : first + answers.CHUNK]

        def part(chosen: Sequence[int] = chosen) -> list[Any]:
            ids, told, counts, many = ask(chosen)
            return [torch.from_numpy(ids), torch.from_numpy(told), counts, many]

        ids, told, counts, many = run.once(f"{name} {first}", part)
        rows += zip(ids.split(counts), told.split(counts), strict=True)

    def again(chosen: Sequence[int]) -> Batch:
        ids, told = (torch.cat([rows[i][part] for i in chosen]).numpy() for part in (0, 1))
        return {**taught.collate(chosen), **_laid(taught, many, ids, told)}

    return again


def _laid(taught: Lesson, many: int, ids: Any, told: Any) -> Batch:
    """What lies beside a batch: of classes by the student's numbers; log-probabilities alone where all of the `many`
    (or more, of a vocabulary that is padded) are told."""
    places, logprobs = torch.from_numpy(np.array(ids)).long(), torch.from_numpy(np.array(told))
    if taught.order:
        places = torch.argsort(torch.tensor(list(taught.order)))[places]
    width = places.shape[1]
    if len(places) and width >= many and int(places.max()) == width - 1 and len(set(places[0].tolist())) == width:
        return {TOLD: torch.zeros_like(logprobs).scatter(1, places, logprobs)}
    return {TOLD: logprobs, IDS: places}


def readable(inputs: Inputs, *, role: str = "student", learned: bool = False) -> None:
    """Whether the records set the model that learns a task, and, where classes are learned beside what a teacher tells,
    all say theirs: DataError by file and line."""
    suited(None, inputs, role=role, learns=f"{CLASSED}; with alpha=1 classes are not learned" if learned else "")


def _does(task: str) -> str:
    return f"for {task}" if task else "of no known task"


def agree(teacher: Model, student: Model) -> None:
    """That one answers what the other does: one task, and the same vocabulary or classes. MismatchError."""
    t, s = teacher.facts, student.facts
    spoken = teacher.can(Top) or teacher.can(Logprobs)
    if spoken and not teacher.can(Logits) and not teacher.can(Answers) and s.task == "causal-lm":
        return  # it is asked in text, and its tokens are known by theirs
    if t.task != s.task:
        raise MismatchError(
            f"a model {_does(s.task)} cannot learn the answers of one {_does(t.task)}",
            why=f"{student.ref} and {teacher.ref} answer different questions",
            fix=f"give a student {_does(t.task)}, or a teacher {_does(s.task)}"
            + ("; distill.cross_modal is for classifiers of different things" if t.labels and s.labels else ""),
        )
    if s.task in tasks.LANGUAGE:
        told = teacher.can(Codec)  # answers that were kept have no tokenizer
        if t.vocabulary_digest != s.vocabulary_digest and not (told and _vocabulary(teacher) == _vocabulary(student)):
            raise MismatchError(
                "teacher and student have different vocabularies",
                why=f"{teacher.ref} has {t.vocabulary} tokens, {student.ref} "
                + (f"{s.vocabulary}" if t.vocabulary != s.vocabulary else "as many, of which some are others"),
                fix="give a student that was made with the teacher's tokenizer"
                + (", or use distill.cross_tokenizer, or distill.text" if s.task == "causal-lm" else ""),
            )
    else:
        classes.same(t.labels, s.labels)


def _vocabulary(model: Model) -> dict[str, int]:
    return model.ask(Codec).tokenizer.get_vocab()
