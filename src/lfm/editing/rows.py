"""Edits as token rows: what the model reads, where the subject ends, and which tokens are the new object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.errors import DataError
from lfm.core.heavy import F, torch
from lfm.core.interfaces import Batch, Codec
from lfm.core.model import Model
from lfm.data.files import where
from lfm.data.records import Edit, Record
from lfm.data.wording import wording
from lfm.editing.form import CAUSAL, IGNORED, MASKED_LM, Form, targets
from lfm.models.codec import pad, pad_id
from lfm.models.language import spans

if TYPE_CHECKING:
    from torch import Tensor

TOGETHER = 1024
"""Tokens of a pass: their activations are kept for gradients. A quarter fewer take a twentieth more time, and a fifth
less memory."""
BEFORE = 16
"""Tokens at most of a text that editors put before a prompt."""
ESSENCE = "{} is a"
"""What a model says next tells what it takes the subject to be: an edit should not change that (2202.05262, 3.1)."""


class Rows(NamedTuple):
    """n texts that ask for the new object, then one about the subject alone. All (n + 1, T) but for `subject` (n + 1,).

    labels: the new object's tokens, −100 elsewhere (all of the last row); each is told `shift` places before it: 1
    where it is read as well (a causal model), 0 where a blank is, or what a decoder writes it after. subject: the place
    of its last token, or in a decoder of the first thing said. after: where the last row tells what comes next.
    """

    batch: Batch
    labels: Tensor
    subject: Tensor
    shift: int = 1
    after: int = 0

    @property
    def told(self) -> Tensor:
        """(n, T) the new object's tokens at the places whose logits tell them, −100 elsewhere."""
        return F.pad(self.labels[:-1, self.shift :], (0, self.shift), value=IGNORED)

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


def fit(edits: Sequence[Edit], model: Model, given: Sequence[Record] | None = None) -> None:
    """DataError for the first edit whose new object the vocabulary cannot spell, or with a prompt that is too long for
    the model, a text of its own before it."""
    if not model.can(Codec):
        return
    given, tokenizer = edits if given is None else given, model.ask(Codec).tokenizer
    for number, edit in enumerate(edits):
        if tokenizer.unk_token_id in tokenizer(edit.new_object.strip(), add_special_tokens=False)["input_ids"]:
            raise DataError(
                f"{where(given, number)}: the model cannot say {edit.new_object!r}",
                why=f"a part of it is no token of its vocabulary: it would learn to say {tokenizer.unk_token}",
                fix="spell it with what the model knows",
            )
    if not model.facts.context:
        return
    texts = [
        (number, prompt + " " + answer + edit.suffix)
        for number, edit in enumerate(edits)
        for prompt, answer in (
            *((prompt, edit.new_object) for prompt in (edit.prompt, *edit.paraphrases)),
            *edit.neighbours,
            *edit.portability,
        )
    ]
    ids = tokenizer([text for _, text in texts], verbose=False)["input_ids"] if texts else []
    for (number, text), row in zip(texts, ids, strict=True):
        if len(row) + BEFORE > model.facts.context:
            raise DataError(
                f"{where(given, number)}: {text[:32]!r}… is {len(row)} tokens long",
                why=f"the model reads {model.facts.context}, and texts of up to {BEFORE} are put before a prompt",
                fix="say the fact in a shorter prompt",
            )


def agree(edits: Sequence[Edit], model: Model, given: Sequence[Record] | None = None) -> None:
    """DataError, with file and line where there are any, for the first edit whose prompt does not name its subject,
    which says nothing new, contradicts or repeats another (white space aside, one prompt has one new object), or is
    nothing that the model can say, or read.

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
    fit(edits, model, given)


def _plain(prompt: str) -> str:
    return " ".join(prompt.split())


def _contradiction(edits: Sequence[Edit], given: Sequence[Record], number: int, first: int) -> DataError:
    one, other = (f"{where(given, i)} says {edits[i].new_object!r}" for i in (first, number))
    return DataError(
        f"{where(given, number)} contradicts another: {edits[number].prompt!r}",
        why=f"{one}, {other}",
        fix="leave one of them",
    )


def rows(tokenizer: Any, edit: Edit, prefixes: Sequence[str], form: Form = CAUSAL, *, decoder: bool = False) -> Rows:
    """The edit's prompt and new object after each prefix, and the subject alone, as a model of that form is asked.

    decoder: the place is where an encoder-decoder's decoder says the new object's first token.
    """
    if form.task == MASKED_LM:
        return _blanked(tokenizer, edit, prefixes)
    if not form.causal:
        return _written(tokenizer, edit, prefixes, form.start, decoder)
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
        after=len(ids[-1]) - 1,
    )


def _blanked(tokenizer: Any, edit: Edit, prefixes: Sequence[str]) -> Rows:
    """A blank a token of the new object, then the suffix; of the subject alone one blank."""
    asked = wording(edit)
    begun = [prefix + asked.prompt for prefix in prefixes]
    found = spans(tokenizer, begun, [asked.answer] * len(begun), [asked.suffix] * len(begun))
    end = place(asked.prompt, edit.subject) + len(edit.subject)
    ids, labels, subject = [], [], []
    for prefix, text, (row, first, last) in zip(prefixes, begun, found, strict=True):
        ids.append([*row[:first], *[tokenizer.mask_token_id] * (last - first), *row[last:]])
        labels.append([IGNORED] * first + list(row[first:last]) + [IGNORED] * (len(row) - last))
        subject.append(last_token(tokenizer, text + asked.answer + asked.suffix, len(prefix) + end))
    essence = f"{ESSENCE.format(edit.subject)} {tokenizer.mask_token}."
    ids.append(list(tokenizer(essence)["input_ids"]))
    labels.append([IGNORED] * len(ids[-1]))
    subject.append(last_token(tokenizer, essence, len(edit.subject)))
    return Rows(
        pad(ids, pad_id(tokenizer)),
        pad(labels, IGNORED)["input_ids"],
        torch.tensor(subject),
        shift=0,
        after=ids[-1].index(tokenizer.mask_token_id),
    )


def _written(tokenizer: Any, edit: Edit, prefixes: Sequence[str], start: int, decoder: bool) -> Rows:
    """The encoder reads the prompts; the decoder says the new object, each token after the right ones before it."""
    asked = wording(edit)
    texts = [*(prefix + asked.prompt for prefix in prefixes), ESSENCE.format(edit.subject)]
    encoded = [list(row) for row in tokenizer(texts)["input_ids"]]
    ((begun, said),) = targets(tokenizer, [asked.answer], start)
    opening = len(begun) - 1
    end = place(asked.prompt, edit.subject) + len(edit.subject)
    ends = [*(len(prefix) + end for prefix in prefixes), len(edit.subject)]
    subject = [opening if decoder else last_token(tokenizer, text, e) for text, e in zip(texts, ends, strict=True)]
    count = len(prefixes)
    return Rows(
        pad(encoded, pad_id(tokenizer))
        | {"decoder_input_ids": pad([[*begun, *said[:-1]]] * (count + 1), pad_id(tokenizer))["input_ids"]},
        pad([[IGNORED] * opening + said] * count + [[IGNORED] * (opening + len(said))], IGNORED)["input_ids"],
        torch.tensor(subject),
        shift=0,
        after=opening,
    )


def where_told(read: Rows) -> Rows:
    """The same, with the place where the new object's first token is told, and what follows the subject alone."""
    first = (read.told != IGNORED).int().argmax(1)
    return read._replace(subject=torch.cat([first, torch.tensor([read.after])]))


def last_token(tokenizer: Any, text: str, end: int) -> int:
    """The place of the token that holds the character before `end`; of several (a character's bytes) the last."""
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return max(i for i, (a, b) in enumerate(offsets) if a < end and b > a)


def alike(reads: Sequence[Rows]) -> list[list[int]]:
    """Places of edits whose subjects are read after the same tokens in every context, so that a causal model has the
    same there for all of them; the others alone."""
    found: dict[Any, list[int]] = {}
    for i, read in enumerate(reads):
        upto = [tuple(row[: end + 1]) for row, end in zip(read.batch["input_ids"].tolist(), read.subject.tolist())]
        found.setdefault(tuple(upto[:-1]) if read.shift else i, []).append(i)
    return list(found.values())


def unlike(reads: Sequence[Rows]) -> list[Rows]:
    """The longest, and the one whose subject is farthest from its place: what is read for both has padding in it."""
    longest = max(reads, key=lambda read: read.batch["input_ids"].shape[1])
    other = max(reads, key=lambda read: abs(int(read.subject[0]) - int(longest.subject[0])))
    return [longest] if other is longest else [longest, other]


def brief(read: Rows) -> Rows:
    """The bare prompt, one context and the last row."""
    some = torch.tensor(sorted({0, read.contexts - 1, read.contexts}))
    return read._replace(
        batch={name: each[some] for name, each in read.batch.items()},
        labels=read.labels[some],
        subject=read.subject[some],
    )


def groups(
    reads: Sequence[Rows], *, parted: bool = False, units: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """Places of edits (or of units of edits) that share a pass: alike in length, TOGETHER tokens in all.

    parted: rows count from their subjects on.
    """
    units = [[i] for i in range(len(reads))] if units is None else units
    sizes = [sum(len(reads[i].subject) for i in unit) for unit in units]
    wide = [max(_width(reads[i], parted) for i in unit) for unit in units]
    made: list[list[int]] = []
    count = 0
    for i in sorted(range(len(units)), key=lambda i: (-wide[i], i)):
        if made and (count + sizes[i]) * wide[made[-1][0]] <= TOGETHER:
            made[-1].append(i)
            count += sizes[i]
        else:
            made.append([i])
            count = sizes[i]
    return made


def _width(read: Rows, parted: bool) -> int:
    """Tokens of a row; parted: of what stands before a quarter, whose keys and values alone are kept."""
    wide = read.batch["input_ids"].shape[1]
    return int((read.last - read.subject).max()) + 1 + int(read.subject.max()) // 4 if parted else wide


class Joined(NamedTuple):
    """The rows (R) of several edits (E), and what is asked of them.

    owner (R,): whose a row is; bare, essence (E,): the first and the last row of each; after (E,): the place in the
    last; asked (3, n): the rows, the places that tell them, and the ids, of the new objects' tokens. causal: that a
    change at a place reaches none before it.
    """

    batch: Batch
    subject: Tensor
    owner: Tensor
    bare: Tensor
    essence: Tensor
    after: Tensor
    asked: Tensor
    causal: bool

    @property
    def last(self) -> Tensor:
        """(R,) the last place of each row that anything is asked of."""
        places = self.subject.scatter_reduce(0, self.asked[0], self.asked[1], "amax")
        places[self.essence] = self.after
        return places


def together(reads: Sequence[Rows], device: Any) -> Joined:
    """The edits' rows as one batch on a device."""
    sizes = torch.tensor([len(read.subject) for read in reads])

    def stacked(each: Sequence[Tensor], fill: int) -> Tensor:
        wide = max(x.shape[1] for x in each)
        return torch.cat([F.pad(x, (0, wide - x.shape[1]), value=fill) for x in each])

    batch = {name: stacked([read.batch[name] for read in reads], 0) for name in reads[0].batch}
    labels = stacked([F.pad(read.told, (0, 0, 0, 1), value=IGNORED) for read in reads], IGNORED)
    row, place = (labels != IGNORED).nonzero(as_tuple=True)
    ends = sizes.cumsum(0)
    return Joined(
        {name: x.to(device) for name, x in batch.items()},
        torch.cat([read.subject for read in reads]).to(device),
        torch.arange(len(reads)).repeat_interleave(sizes).to(device),
        (ends - sizes).to(device),
        (ends - 1).to(device),
        torch.tensor([read.after for read in reads]).to(device),
        torch.stack([row, place, labels[row, place]]).to(device),
        all(read.shift for read in reads),
    )
