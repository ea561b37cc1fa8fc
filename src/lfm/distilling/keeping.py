"""Keeping what a teacher tells: chunk after chunk onto the disk, so that a kill costs no more than one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lfm.core import Answers, Codec, Logits, Model, Run
from lfm.core.errors import AccessError, ConfigError, DataError, MismatchError
from lfm.core.heavy import np, torch
from lfm.core.interfaces import Classes
from lfm.core.model import Facts
from lfm.data import task as tasks
from lfm.distilling import answers
from lfm.distilling import lesson as lessons
from lfm.models.answers import CODE, KeptAnswers, manifest_of, model_of, write_code
from lfm.models.answers.codec import LONGEST, Code, code_for, encode
from lfm.models.answers.shards import Writer

SAMPLE = 256
"""Records by which ids are weighed, spread over all of them."""


def agree(teacher: Model, reader: Model) -> None:
    """That the teacher can be asked with this reader's tokens. AccessError."""
    if teacher.can(Logits) and reader is not teacher and teacher.facts.task in tasks.LANGUAGE:
        lessons.agree(teacher, reader)
    if not teacher.can(Logits) and not teacher.can(Classes) and not reader.can(Codec):
        raise AccessError(
            f"{teacher.ref} is asked in text",
            why="which says nothing of tokens",
            fix="add reader=STUDENT, whose are meant",
        )


def lesson(records: Sequence[Any], teacher: Model, reader: Model) -> lessons.Lesson:
    """The records as they are asked: in the reader's tokens, or, of a teacher that gives classes alone, as they are."""
    if reader.can(Codec):
        return lessons.lesson(records, teacher, reader)
    numbers = range(len(records))

    def unread(chosen: Sequence[int]) -> Any:
        raise AssertionError("no batch is made of records that are told as they are")

    task: Any = None
    return lessons.Lesson(records, numbers, task, unread, unread, range(len(teacher.ask(Classes).labels)))


def keep(taught: lessons.Lesson, teacher: Model, facts: Facts, k: int, run: Run, kept: Model | None) -> Model:
    """The answers to a lesson, each question's once. kept: answers of the same teacher, taken over as they are."""
    place = run.work / "answers"
    before = _before(kept, teacher, k)
    ask = answers.asking(taught, teacher, k)
    code = before.code if before else _code(taught, ask, run)
    keys = answers.questions(taught)
    first = {key: number for number, key in reversed(list(enumerate(keys)))}
    asked = [taught.numbers[number] for number in sorted(first.values())]
    known = before.find([keys[n] for n in asked]) if before else np.full(len(asked), -1)
    fresh = [n for n, where in zip(asked, known, strict=True) if where < 0]
    old = [int(where) for where in known if where >= 0]

    def written() -> None:
        """Chunk by chunk, after those that lie there."""
        writer = Writer(place)
        for begin in range(writer.count, len(old), answers.CHUNK):  # the disk is waited for once a chunk
            assert before is not None
            some = old[begin : begin + answers.CHUNK]
            entries = [before.shards.entries[number] for number in some]
            packed = [bytes(before.shards.read(number)) for number in some]
            writer.add([e["key"].tobytes() for e in entries], packed, [int(e["places"]) for e in entries])
        parts = range(0, len(fresh), answers.CHUNK)
        for begin in run.track(parts, "asking the teacher", len(parts)):
            chosen = fresh[begin : begin + answers.CHUNK]
            done = min(max(writer.count - len(old) - begin, 0), len(chosen))
            if done == len(chosen):
                continue
            ids, told, counts, _ = ask(chosen)  # the whole chunk, as if never interrupted: padding changes sums
            ends = np.cumsum([0, *counts]).tolist()
            packed = [encode(code, ids[a:b], told[a:b]) for a, b in pairwise(ends)]
            writer.add([keys[n] for n in chosen[done:]], packed[done:], counts[done:])
        write_code(code, place / CODE)

    run.once("answers", written)
    manifest = manifest_of(place, teacher.ref, teacher.digest, facts, code.k, code.vocabulary)
    if not manifest.places:
        raise DataError(
            "these records ask nothing", why="none has a token to be told", fix="records that are not empty"
        )
    run.note(questions=manifest.questions, places=manifest.places, bytes_a_place=manifest.bytes / manifest.places)
    run.note(asked=len(fresh))
    return model_of(place, manifest)


def _before(kept: Model | None, teacher: Model, k: int) -> KeptAnswers | None:
    if kept is None:
        return None
    found = _kept(kept)
    if (asked := teacher_of(kept)) != teacher.digest:
        raise MismatchError(
            f"{kept.ref} holds answers of another teacher",
            why=f"it asked {asked[:12]}, {teacher.ref} is {teacher.digest[:12]}",
            fix="that one, or new answers (leave kept out)",
        )
    if found.k != min(k, found.manifest.vocabulary):
        raise ConfigError(f"{kept.ref} holds {found.k} answers a place", fix=f"k={found.k} (-k {found.k})")
    return found


def _kept(model: Model) -> KeptAnswers:
    found = model.ask(Answers)
    assert isinstance(found, KeptAnswers)
    return found


def teacher_of(kept: Model) -> str:
    """The digest of the model that answered."""
    return _kept(kept).manifest.teacher_digest


def _code(taught: lessons.Lesson, ask: answers.Ask, run: Run) -> Code:
    """By how often each id is among the likeliest in a sample of the records."""

    def weighed() -> list[Any]:
        every = max(1, len(taught.records) // SAMPLE)
        chosen = taught.numbers[::every][:SAMPLE]
        weights, k = np.zeros(0), 1
        for begin in range(0, len(chosen), answers.CHUNK):
            ids, _, _, vocabulary = ask(chosen[begin : begin + answers.CHUNK])
            counts = np.bincount(ids.reshape(-1), minlength=vocabulary).astype(np.float64)
            weights, k = (counts if not len(weights) else weights + counts), ids.shape[1]
        return [torch.from_numpy(weights), k]

    weights, k = run.once("weights", weighed)
    if len(weights) > LONGEST:
        raise ConfigError(f"{len(weights)} ids are more than answers are kept of", why=f"{LONGEST} are the most")
    return code_for(k, weights.numpy())


def bytes_a_place(k: int, vocabulary: int) -> float:
    """About how many bytes a place takes."""
    if k >= vocabulary:
        return 4.0 * vocabulary
    return k * (2.0 + 0.06 * float(np.log2(max(vocabulary / k, 1)))) * 0.8 + 4
