"""Edits as token rows: what the model reads, where the subject ends, and which tokens are the new object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.errors import DataError
from lfm.core.heavy import F, torch
from lfm.core.model import Batch
from lfm.data.files import where
from lfm.data.records import Edit, Record
from lfm.data.wording import wording
from lfm.models.codec import pad, pad_id
from lfm.models.language import BATCH_TOKENS, spans

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
ESSENCE = "{} is a"
"""What a model says next tells what it takes the subject to be: an edit should not change that (2202.05262, 3.1)."""


class Rows(NamedTuple):
    """n texts that end in the new object, then one about the subject alone. All (n + 1, T) but for `subject` (n + 1,).

    labels lie on the tokens they name, −100 elsewhere (all of the last row); subject: the place of its last token.
    """

    batch: Batch
    labels: Tensor
    subject: Tensor

    @property
    def contexts(self) -> int:
        return len(self.subject) - 1

    @property
    def last(self) -> Tensor:
        """(n + 1,) the place of each row's last token."""
        return self.batch["attention_mask"].sum(1) - 1


def place(text: str, subject: str) -> int:
    """Where the subject begins in a text, where it is last named; capitals may differ. −1 if nowhere."""
    found = text.rfind(subject)
    return found if found >= 0 or len(text.lower()) != len(text) else text.lower().rfind(subject.lower())


def agree(edits: Sequence[Edit], given: Sequence[Record] | None = None) -> None:
    """DataError, with file and line where there are any, for the first edit whose prompt does not name its subject,
    which says nothing new, or contradicts or repeats another: white space aside, one prompt has one new object.

    given: the records that the edits were made of, where they are not edits themselves.
    """
    given = edits if given is None else given
    said: dict[str, int] = {}
    repeats: list[tuple[int, int]] = []
    for number, edit in enumerate(edits):
        here = where(given, number)
        if not edit.subject.strip() or place(edit.prompt, edit.subject) < 0:
            raise DataError(
                f"{here}: {edit.prompt!r} does not name its subject {edit.subject!r}",
                why="the fact is looked up at the subject's last token",
                fix="write the prompt with the subject as it is spelled",
            )
        if not edit.new_object.strip():
            raise DataError(
                f"{here}: {edit.prompt!r} has no new_object",
                why="an edit needs something to say",
                fix="name it, or forget the fact: edit.unlearn",
            )
        first = said.setdefault(_plain(edit.prompt), number)
        if first == number:
            continue
        if edits[first].new_object.strip() != edit.new_object.strip():
            raise _contradiction(edits, given, number, first)
        repeats.append((number, first))
    for number, edit in enumerate(edits):
        for prompt in edit.paraphrases:
            other = said.get(_plain(prompt))
            if other is not None and edits[other].new_object.strip() != edit.new_object.strip():
                raise _contradiction(edits, given, max(number, other), min(number, other))
    if repeats:
        number, first = repeats[0]
        raise DataError(
            f"{where(given, number)} repeats {where(given, first)}: {edits[number].prompt!r}",
            why=f"{len(repeats)} of {len(edits)} edits ask for what an earlier one asks" if len(repeats) > 1 else "",
            fix="leave one of them" if len(repeats) == 1 else "leave one of each",
        )


def _plain(prompt: str) -> str:
    return " ".join(prompt.split())


def _contradiction(edits: Sequence[Edit], given: Sequence[Record], number: int, first: int) -> DataError:
    one, other = (f"{where(given, i)} says {edits[i].new_object!r}" for i in (first, number))
    return DataError(
        f"{where(given, number)} contradicts another: {edits[number].prompt!r}",
        why=f"{one}, {other}",
        fix="leave one of them",
    )


def rows(tokenizer: Any, edit: Edit, prefixes: Sequence[str]) -> Rows:
    """The edit's prompt and new object after each prefix, and the subject alone."""
    asked = wording(edit)
    essence = ESSENCE.format(edit.subject)
    begun = [prefix + asked.prompt for prefix in prefixes]
    found = spans(tokenizer, [*begun, ""], [asked.answer] * len(begun) + [essence], [""] * (len(begun) + 1))
    ids = [list(row[:last]) for row, _, last in found]
    labels = [[IGNORED] * first + row[first:] for row, (_, first, _) in zip(ids[:-1], found, strict=False)]
    texts = [prefix + asked.prompt + asked.answer for prefix in prefixes] + [essence]
    end = place(asked.prompt, edit.subject) + len(edit.subject)
    ends = [len(prefix) + end for prefix in prefixes] + [len(edit.subject)]
    subject = [last_token(tokenizer, text, end) for text, end in zip(texts, ends, strict=True)]
    return Rows(
        pad(ids, pad_id(tokenizer)),
        pad([*labels, [IGNORED] * len(ids[-1])], IGNORED)["input_ids"],
        torch.tensor(subject),
    )


def last_token(tokenizer: Any, text: str, end: int) -> int:
    """The place of the token that holds the character before `end`; of several (a character's bytes) the last."""
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return max(i for i, (a, b) in enumerate(offsets) if a < end and b > a)


def groups(reads: Sequence[Rows]) -> list[list[int]]:
    """Places of edits that share a pass: alike in length, BATCH_TOKENS in all."""
    shapes = [tuple(read.batch["input_ids"].shape) for read in reads]
    made: list[list[int]] = []
    count = 0
    for i in sorted(range(len(reads)), key=lambda i: (-shapes[i][1], i)):
        if made and (count + shapes[i][0]) * shapes[made[-1][0]][1] <= BATCH_TOKENS:
            made[-1].append(i)
            count += shapes[i][0]
        else:
            made.append([i])
            count = shapes[i][0]
    return made


class Joined(NamedTuple):
    """The rows (R) of several edits (E), and what is asked of them.

    owner (R,): whose a row is; bare, essence (E,): the first and the last row of each; asked (3, n): the rows, the
    places before, and the ids, of the new objects' tokens.
    """

    batch: Batch
    subject: Tensor
    owner: Tensor
    bare: Tensor
    essence: Tensor
    asked: Tensor

    @property
    def last(self) -> Tensor:
        """(R,) the place of each row's last token."""
        return self.batch["attention_mask"].sum(1) - 1


def together(reads: Sequence[Rows], device: Any) -> Joined:
    """The edits' rows as one batch on a device."""
    wide = max(read.batch["input_ids"].shape[1] for read in reads)
    sizes = torch.tensor([len(read.subject) for read in reads])

    def stacked(each: Sequence[Tensor], fill: int) -> Tensor:
        return torch.cat([F.pad(x, (0, wide - x.shape[1]), value=fill) for x in each])

    batch = {
        "input_ids": stacked([read.batch["input_ids"] for read in reads], 0),
        "attention_mask": stacked([read.batch["attention_mask"] for read in reads], 0),
    }
    labels = stacked([read.labels for read in reads], IGNORED)[:, 1:]
    row, place = (labels != IGNORED).nonzero(as_tuple=True)
    ends = sizes.cumsum(0)
    return Joined(
        {name: x.to(device) for name, x in batch.items()},
        torch.cat([read.subject for read in reads]).to(device),
        torch.arange(len(reads)).repeat_interleave(sizes).to(device),
        (ends - sizes).to(device),
        (ends - 1).to(device),
        torch.stack([row, place, labels[row, place]]).to(device),
    )
