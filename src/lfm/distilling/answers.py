"""Asking a teacher for its likeliest answers, by what it gives, and by what a question is known once they are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from blake3 import blake3

from lfm.core import Answers, Logits, Logprobs, Model, Sizes
from lfm.core.errors import AccessError, CorruptError, MismatchError
from lfm.core.heavy import np, torch
from lfm.core.interfaces import Classes, Top
from lfm.data import files
from lfm.data.language import IGNORED
from lfm.models.answers import KEY
from lfm.models.language import ids_by_text

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from lfm.distilling.lesson import Lesson

ACCESS: tuple[type, ...] = (Top, Logprobs, Classes, Answers, Logits)
"""What a teacher's answers can be learned from; what a slot's any_of names."""

ASKED: tuple[type, ...] = (Top, Logprobs, Classes, Logits)
"""What a teacher's answers can be kept of."""

CHUNK = 64
"""Records that are asked about at once, and kept at once."""


class Told(NamedTuple):
    """ids int32 and natural-log probabilities fp32 (N, k), best first; how many of the N places each record has, and
    how many ids there are."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    counts: list[int]
    vocabulary: int


Ask = Callable[[Sequence[int]], Told]
"""Record numbers → what the teacher tells of them."""


def queries(sizes: Sizes, role: str = "teacher") -> tuple[int, int]:
    """(queries, tokens) that asking costs: nothing where it gives logits or kept answers; one a record where it gives
    classes; else one for each token that a reader is scored on. Of a reader without a tokenizer here these are reckoned
    by its vocabulary's size, from half of a record's tokens on the mean."""
    given, amount = next(iter(sizes.gives.get(role, ())), ()), sizes.data["train"]
    if Logits in given or Answers in given or not given:
        return 0, 0
    if Classes in given:
        return amount.records, amount.tokens
    readers = [name for name in ("reader", "student") if sizes.models.get(name)]
    if (counted := next((sizes.questions("train", name) for name in readers), None)) is not None:
        return counted
    places = int(amount.tokens * finer(next((sizes.model(name).vocabulary for name in readers), 0)))
    return places, places * (places // max(amount.records, 1) + 2) // 2  # and each asks for one more


def finer(vocabulary: int) -> float:
    """How many times as many tokens texts are, by a vocabulary of so many, as amounts reckon with, who do not know it.

    A token covers about log₂ V / 4 bytes of prose (2.0 measured of 512, 3.6 of 4096, 4.2 of 50 257), and they say 4.
    """
    return max(1.0, 16 / math.log2(vocabulary)) if vocabulary > 1 else 1.0


def questions(taught: Lesson) -> list[bytes]:
    """What each record asks, as 16 bytes: of a language model the tokens that it reads and those that it is scored on,
    of a classifier the record without its class."""
    if taught.order:
        bare = [msgspec.structs.replace(record, label="", group="") for record in taught.records]
        return [bytes.fromhex(files.digest([record]))[:KEY] for record in bare]
    found: list[bytes] = []
    for first in range(0, len(taught.records), CHUNK):
        batch = taught.collate(taught.numbers[first : first + CHUNK])
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            read, asked = ids[mask.bool()].numpy(), labels.numpy()
            ends = np.flatnonzero(asked != IGNORED)
            scored = asked[: ends[-1] + 1 if len(ends) else 0]
            whole = blake3(np.array([len(read)], np.int64).tobytes())
            whole.update(read.astype("<i8").tobytes())
            whole.update(scored.astype("<i8").tobytes())
            found.append(whole.digest()[:KEY])
    return found


def asking(taught: Lesson, teacher: Model, k: int) -> Ask:
    """How to ask this teacher for its k likeliest answers, all of them where there are fewer. AccessError, where its
    access does not reach. Classes are by the teacher's own numbers."""
    if teacher.can(Logits):
        return _by_logits(taught, teacher, k)
    if taught.order:
        return _by_classes(taught, teacher, k)
    return _by_text(taught, teacher, k)


def _by_logits(taught: Lesson, teacher: Model, k: int) -> Ask:
    def ask(chosen: Sequence[int]) -> Told:
        batch = taught.theirs(chosen)
        logits = teacher.ask(Logits).logits(batch)
        counts = [1] * len(chosen)
        if not taught.order:
            counts = (batch["labels"] != IGNORED).sum(1).tolist()
            logits = taught.task.scored(logits, batch)[0]
            assert taught.codec is not None
            logits = logits[:, : len(taught.codec.tokenizer)]  # rows beyond are padding, which a student may not have
        _numbers(taught, chosen, logits, counts, teacher)
        best = logits.float().log_softmax(-1).topk(min(k, logits.shape[-1]))
        return Told(best.indices.int().cpu().numpy(), best.values.cpu().numpy(), counts, logits.shape[-1])

    return ask


def _numbers(taught: Lesson, chosen: Sequence[int], logits: Tensor, counts: Sequence[int], teacher: Model) -> None:
    """CorruptError naming the record of which a teacher tells what are no numbers."""
    bad = torch.isnan(logits).any(-1) | (logits == float("inf")).any(-1) | (logits == float("-inf")).all(-1)
    if bool(bad.any()):
        rows = torch.repeat_interleave(torch.arange(len(chosen)), torch.tensor(counts))
        record = chosen[int(rows[int(bad.nonzero()[0])])]
        raise CorruptError(
            f"{teacher.ref} told no numbers of {files.where(taught.records, record)}",
            why="its logits there are NaN or infinite",
            fix="leave that record out, or use another teacher",
        )


def _by_classes(taught: Lesson, teacher: Model, k: int) -> Ask:
    if not teacher.can(Classes):
        raise AccessError(
            f"{teacher.ref} names no classes",
            why="it tells next tokens, and a classifier learns classes",
            fix="make a classifier of it first: prompt.manual and its kin save one that gives classes",
        )
    told = teacher.ask(Classes)

    def ask(chosen: Sequence[int]) -> Told:
        found = torch.from_numpy(told.tell([taught.records[i] for i in chosen])).float().log_softmax(-1)
        best = found.topk(min(k, found.shape[-1]))
        return Told(best.indices.int().numpy(), best.values.numpy(), [1] * len(chosen), found.shape[-1])

    return ask


def _by_text(taught: Lesson, teacher: Model, k: int) -> Ask:
    """One question a place: the text before it. Tokens are known by their text, so that the teacher may have others;
    what is told of those that the student lacks, or that read like several, stays with what is left out. Before the
    first word there is no text, and endpoints refuse an empty one: there the record's own token is the answer."""
    if taught.codec is None or not taught.task.name.endswith("causal-lm"):
        raise AccessError(
            f"{teacher.ref} tells next tokens alone",
            why="only a causal student can be asked the same place by place",
            fix="a causal student, or a teacher that gives logits",
        )
    tokenizer = taught.codec.tokenizer
    spelled = {text: ids[0] for text, ids in ids_by_text(tokenizer, len(tokenizer)).items() if len(ids) == 1}
    top = teacher.ask(Logprobs if teacher.can(Logprobs) else Top).top
    width = min(k, len(tokenizer))

    def ask(chosen: Sequence[int]) -> Told:
        batch = taught.collate(chosen)
        prompts: list[str] = []
        own: list[int] = []
        counts: list[int] = []
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            places = [place for place, label in enumerate(labels) if label != IGNORED]
            prompts += [tokenizer.decode(ids[:place], skip_special_tokens=True) for place in places]
            own += [labels[place] for place in places]
            counts.append(len(places))
        told = iter(top([prompt for prompt in prompts if prompt], k))
        known = [
            [(spelled[t], p) for t, p in next(told) if t in spelled][:width] if prompt else [(label, 0.0)]
            for prompt, label in zip(prompts, own, strict=True)
        ]
        found = np.empty((len(known), width), np.int32)
        logprobs = np.full((len(known), width), -np.inf, np.float32)
        for row, best in enumerate(known):
            first = [i for i, _ in best]
            # what is not told fills the row with a probability of none
            others = (i for i in range(len(tokenizer)) if i not in first)
            found[row] = [*first, *(next(others) for _ in range(width - len(first)))]
            logprobs[row, : len(first)] = [p for _, p in best]
        return Told(found, logprobs, counts, len(tokenizer))

    return ask


def found(taught: Lesson, teacher: Model) -> NDArray[np.int64]:
    """Where each record's answers lie among those that are kept. MismatchError where some are not there."""
    numbers = teacher.ask(Answers).find(questions(taught))
    missing = np.flatnonzero(numbers < 0)
    if len(missing):
        first = files.where(taught.records, int(missing[0]))
        raise MismatchError(
            f"{teacher.ref} has no answers to {len(missing)} of {len(numbers)} records (the first: {first})",
            why="the teacher was never asked about them"
            + ("" if taught.order else ", or a shorter context or another tokenizer cuts them otherwise"),
            fix=f"`lfm distill cache teacher=TEACHER train=FILE kept={teacher.ref} --out MORE` asks about them alone",
        )
    return numbers
