"""One text as a student and a teacher with other tokens read it: which of their places are compared, in a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core import Codec, Logits, Model
from lfm.core.heavy import F, torch
from lfm.data import task as tasks
from lfm.data.language import IGNORED
from lfm.data.records import Record
from lfm.distilling import spans
from lfm.distilling.spans import Reading, Span
from lfm.distilling.telling import BIAS, HEAD, TOLD
from lfm.models.codec import pad, pad_id
from lfm.models.headless import Headless
from lfm.train.headed import rowwise

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch

ROWS, NEXT, SCORED, FIRST, CHAIN, WHOLE = "rows", "next", "scored", "first", "chain", "whole"
"""Names in a batch. rows: (R,) places of the student's flat answers that are looked at, in order; next: (R,) the token
that follows each; scored: (R,) whether that is a label. first: (N,) which rows TOLD is about. chain: (M, 2) row and
span of the tokens of spans of several; whole: (S,) log π_t of these."""


class Read(NamedTuple):
    """A record as both read it, and the spans that they share."""

    ours: Reading
    theirs: Reading
    spans: list[Span]


Both = Callable[[int], Read]
"""A record's number → it as both read it; each is read once."""


def reading(records: Sequence[Record], student: Model, teacher: Model) -> Both:
    models = (student, teacher)
    codecs = [model.ask(Codec) for model in models]
    ours, theirs = (tasks.task_for(records, c, m.facts) for c, m in zip(codecs, models, strict=True))

    @cache
    def read(number: int) -> Read:
        mine = spans.read(records[number], ours, codecs[0].tokenizer)
        other = spans.read(records[number], theirs, codecs[1].tokenizer)
        return Read(mine, other, spans.align(mine, other))

    return read


Pairs = Callable[[Read], Iterable[tuple[int, int]]]
"""Places of tokens, the student's and the teacher's, whose predictions are compared; in order."""


def collating(
    read: Both, student: Model, teacher: Model, pairs: Pairs, *, labels: bool, chains: bool
) -> Callable[[Sequence[int]], Batch]:
    """Numbers → the student's batch, with what the teacher tells of the places compared and the names above beside it.

    labels: whether scored places are looked at that are not compared. chains: whether spans of several tokens are told.
    """
    mine, other = (model.ask(Codec).tokenizer for model in (student, teacher))
    answer = _answering(teacher)

    def collate(numbers: Sequence[int]) -> Batch:
        found = [read(number) for number in numbers]
        ours = pad([each.ours.ids for each in found], pad_id(mine))
        theirs = pad([each.theirs.ids for each in found], pad_id(other))
        wanted = pad([each.ours.labels for each in found], IGNORED)["input_ids"]
        wanted[:, 0] = IGNORED  # nothing predicts it
        width, length = ours["input_ids"].shape[1], theirs["input_ids"].shape[1]
        both = [(row * width + a - 1, row * length + b - 1) for row, each in enumerate(found) for a, b in pairs(each)]
        several = [(row, span) for row, each in enumerate(found) for span in each.spans if chains and not span.single]
        chain = [(row * width + i - 1, n) for n, (row, span) in enumerate(several) for i in range(*span.ours)]
        other_chain = [(row * length + i - 1, n) for n, (row, span) in enumerate(several) for i in range(*span.theirs)]
        scored = wanted.flatten().roll(-1) != IGNORED
        looked = {place for place, _ in [*both, *chain]} | ({*scored.nonzero()[:, 0].tolist()} if labels else set())
        at = {place: i for i, place in enumerate(sorted(looked))}
        rows = _numbers(sorted(looked))
        return {
            **ours,
            "labels": wanted,
            ROWS: rows,
            NEXT: ours["input_ids"].flatten().roll(-1)[rows],
            SCORED: scored[rows],
            FIRST: _numbers([at[place] for place, _ in both]),
            CHAIN: _numbers([(at[place], n) for place, n in chain]).reshape(-1, 2),
            **_told(
                answer(theirs), theirs, _numbers([place for _, place in both]), _numbers(other_chain), len(several)
            ),
        }

    return collate


def _answering(teacher: Model) -> Callable[[Batch], Headless | Tensor]:
    """What the teacher's head reads, and the head, wherever its logits are no more than that; else its logits."""
    ask = teacher.ask(Logits)
    found: list[Any] = []

    def answered(batch: Batch) -> Headless | Tensor:
        if not found:
            behind = getattr(ask, "behind", None)
            found.append((behind(batch) if behind else None) or ask.logits)
        return found[0](batch)

    return answered


def _told(answers: Headless | Tensor, read: Batch, places: Tensor, chain: Tensor, count: int) -> Batch:
    chain = chain.reshape(-1, 2)
    tokens = read["input_ids"].flatten()[chain[:, 0] + 1]
    with torch.no_grad():
        said = rowwise(rows_of(answers, chain[:, 0]), lambda logits, part: next_of(logits, tokens[part]))
    whole = chained(said, chain[:, 1], count)
    if not isinstance(answers, Headless):
        return {TOLD: rows_of(answers, places).float(), WHOLE: whole}
    behind = {HEAD: answers.weight} | ({} if answers.bias is None else {BIAS: answers.bias})
    return {TOLD: rows_of(answers, places).hidden.clone(), WHOLE: whole, **behind}


def rows_of(answers: Any, places: Tensor) -> Any:
    """Of answers (B, T, ·) those at flat places; of a head's what it reads there, and the head."""
    if isinstance(answers, Headless):
        return answers._replace(hidden=rows_of(answers.hidden, places))
    return answers.flatten(0, 1)[places.to(answers.device)]


def next_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """(n,) log-probabilities of these tokens, by logits (n, V)."""
    return F.log_softmax(logits, -1).gather(-1, tokens[:, None].to(logits.device))[:, 0]


def chained(said: Tensor, spans: Tensor, count: int) -> Tensor:
    """(count,) log-probabilities of spans: the sums over their tokens, said (M,), of spans (M,)."""
    return said.new_zeros(count).index_add(0, spans.to(said.device), said)


def compared(batch: Batch, apart: Callable[[Tensor, slice], Tensor]) -> Callable[[Tensor, slice], Tensor]:
    """What `rowwise` measures of a batch's ROWS, (n, 2): log p of the token that follows, and how far the row is from
    what the teacher tells, 0 where it tells nothing. apart: (logits of rows, which of TOLD) → (n,)."""
    first = batch[FIRST].tolist()

    def measure(logits: Tensor, part: slice) -> Tensor:
        here = [i for i, row in enumerate(first) if part.start <= row < part.stop]
        about = slice(here[0], here[-1] + 1) if here else slice(0, 0)
        rows = batch[FIRST][about] - part.start
        far = logits.new_zeros(len(logits)).index_add(0, rows, apart(logits[rows], about))
        return torch.stack([next_of(logits, batch[NEXT][part]), far], -1)

    return measure


def _numbers(found: Sequence[Any]) -> Tensor:
    return torch.tensor(found, dtype=torch.long)
