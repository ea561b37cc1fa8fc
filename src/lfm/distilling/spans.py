"""Two tokenizers on one text: where both have read the same bytes, and which tokens mean the same."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from lfm.core.errors import MismatchError
from lfm.data.chat import counts, rendered
from lfm.data.language import IGNORED
from lfm.data.records import Chat, Completion, Record, Text

if TYPE_CHECKING:
    from lfm.data.task import Task

Key = tuple[int, int]
"""Where a token ends: which text of the record (a conversation has one a turn), and how many of its bytes in."""

END = 2**40
"""The place after a text's last byte: of the token that ends it."""


class Reading(NamedTuple):
    """A record as one model reads it. keys: where each token ends; None where it is of no text."""

    ids: list[int]
    labels: list[int]
    keys: list[Key | None]


class Span(NamedTuple):
    """Tokens of two readings that say the same bytes: places ours[0] … ours[1] − 1 of one, theirs of the other."""

    ours: tuple[int, int]
    theirs: tuple[int, int]

    @property
    def single(self) -> bool:
        return self.ours[1] - self.ours[0] == self.theirs[1] - self.theirs[0] == 1


def align(ours: Reading, theirs: Reading) -> list[Span]:
    """All between one place where both have a token's end and the next such place; the finest common partition.

    What stands before the first common end of a text, or after its last, is in no span; nor is what is not scored.
    """
    ends = [{key: place for place, key in enumerate(r.keys) if key is not None} for r in (ours, theirs)]
    common = sorted(ends[0].keys() & ends[1].keys())
    found = [
        Span((ends[0][a] + 1, ends[0][b] + 1), (ends[1][a] + 1, ends[1][b] + 1))
        for a, b in itertools.pairwise(common)
        if a[0] == b[0]
    ]
    return [span for span in found if any(label != IGNORED for label in ours.labels[slice(*span.ours)])]


# ---------------------------------------------------------------------------------------------- reading


def read(record: Record, task: Task, tokenizer: Any) -> Reading:
    """A text, completion or conversation by its task's own row, so that what is cut from it is cut here too."""
    batch = task.collate([record])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    whole, keys, last = _keyed(record, tokenizer)
    if ids[: len(whole)] != whole[: len(ids)]:  # a prompt has lost its beginning
        gone = len(whole) + (ids[-1] != whole[-1]) - len(ids)
        keys = [None, *keys[gone + 1 :]]
        whole = [ids[0], *whole[gone + 1 :]]
    if len(ids) == len(whole) + 1:
        keys = [*keys, (last, END)]
    keys = [*keys, *[None] * (len(ids) - len(keys))]  # of a text without tokens, those that stand around it
    return Reading(ids, labels, keys[: len(ids)])


def _keyed(record: Record, tokenizer: Any) -> tuple[list[int], list[Key | None], int]:
    """(ids, where each ends, the last text's number), less what ends them all."""
    if isinstance(record, Chat):
        return _chat(record, tokenizer)
    text = record.prompt + record.completion if isinstance(record, Completion) else cast("Text", record).text
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    special = encoded["special_tokens_mask"]
    count = len(special)
    while count and special[count - 1]:
        count -= 1
    ids = list(encoded["input_ids"])[:count]
    front = next((i for i in range(count) if not special[i]), count)
    stops, added = ends_of(text, ids[front:], encoded["offset_mapping"][front:count], tokenizer)
    keys: list[Key | None] = [None] * front
    if front:
        keys[-1] = (0, -added)  # where one of two puts a space before the text, their first tokens do not mean the same
    return ids, keys + [(0, stop) for stop in stops], 0


def _chat(record: Chat, tokenizer: Any) -> tuple[list[int], list[Key | None], int]:
    text, said = rendered(record, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    stops, _ = ends_of(text, ids, encoded["offset_mapping"], tokenizer)
    keys: list[Key | None] = [None] * len(ids)
    contents = [m.content.strip() for m in record.messages if counts(m)]
    special = set(tokenizer.all_special_ids)
    for number, (content, (start, stop)) in enumerate(zip(contents, said, strict=True)):
        at = text.find(content, start, stop)
        if at < 0:
            continue  # the template writes it otherwise
        first = len(text[:at].encode())
        size = len(content.encode())
        for place, end in enumerate(stops):
            if 0 <= end - first <= size:
                keys[place] = (number, end - first)
        ending = next((place for place, end in enumerate(stops) if end - first > size), None)
        if ending is not None and ids[ending] in special:
            keys[ending] = (number, END)
    return ids, keys, len(contents) - 1


def ends_of(text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], tokenizer: Any) -> tuple[list[int], int]:
    """(the byte of the text at which each token ends, how many bytes the tokenizer put before the text: 0 or 1).

    By what the tokens spell where together they spell the text: exact within a character, and of white space, which
    offsets may trim. Else by the offsets' characters, for tokenizers that fold case or know not every word.
    """
    spelled = [spellings(tokenizer)[i] for i in ids]
    whole = text.encode()
    if all(piece is not None for piece in spelled):
        joined = b"".join(cast("list[bytes]", spelled))
        added = int(joined == b" " + whole)
        if added or joined == whole:
            at, stops = -added, []
            for piece in cast("list[bytes]", spelled):
                at += len(piece)
                stops.append(at)
            return stops, added
    width = [0]
    for character in text:
        width.append(width[-1] + len(character.encode()))
    found, at = [], 0
    for _, stop in offsets:
        at = max(at, width[stop])
        found.append(at)
    return found, int(bool(spelled) and (spelled[0] or b"").startswith(b" ") and not whole.startswith(b" "))


# ---------------------------------------------------------------------------------------------- vocabularies


@lru_cache(8)
def spellings(tokenizer: Any) -> tuple[bytes | None, ...]:
    """The bytes that each token stands for, by id; None for special ones. MismatchError where it cannot be told.

    Byte-level tokens by GPT-2's table of bytes; of others ▁ is a space and <0x…> a byte; a word piece that begins a
    word has the space before it.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise MismatchError(
            "this tokenizer does not tell where its tokens begin and end",
            why="it is no fast tokenizer of transformers",
            fix="save it with one (tokenizer.json)",
        )
    vocabulary = tokenizer.get_vocab()
    made: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    special = set(tokenizer.all_special_tokens)
    kinds = _kinds(json.loads(tokenizer.backend_tokenizer.to_str()))
    table = _byte_table() if "ByteLevel" in kinds else {}
    for token, id in vocabulary.items():
        if token in special:
            continue
        if table:
            made[id] = bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            made[id] = bytes([int(token[3:5], 16)])
        elif "WordPiece" in kinds:
            begins = "" if token.startswith("##") else " " if token[:1].isalnum() else ""
            made[id] = (begins + token.removeprefix("##")).encode()
        else:
            made[id] = token.replace("▁", " ").encode()
    return tuple(made)


def _kinds(part: Any) -> set[str]:
    """The types of a tokenizer's parts that say how its tokens are written."""
    found: set[str] = set()
    for name in ("pre_tokenizer", "decoder", "model"):
        found |= _types(part.get(name))
    return found


def _types(part: Any) -> set[str]:
    if isinstance(part, list):
        return set().union(*map(_types, part))
    if not isinstance(part, dict):
        return set()
    inner = [value for key, value in part.items() if key != "vocab"]
    return {part["type"]} | _types(inner) if "type" in part else _types(inner)


def _byte_table() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, others for those from 256 on, in order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


class Classes(NamedTuple):
    """Kinds of next tokens that both models can tell: each token's, by id, of so `many`."""

    ours: list[int]
    theirs: list[int]
    many: int


def classes(ours: Any, theirs: Any, sizes: tuple[int, int]) -> Classes:
    """Of two tokenizers. A token that both have is a class; another belongs with its longest beginning that both have.

    So nothing a teacher tells is thrown away: what it gives to a word that the student writes in two tokens is given to
    the first of them (as 2605.21699 projects, rather than parting what is shared from what is not). Special tokens are
    shared by name, those that end a text by what they do; all else is one class more. sizes: of the logits, with the
    rows that pad them. Equal vocabularies give each token its own class, those of one spelling the same.
    """
    named = [_names(tokenizer, size) for tokenizer, size in zip((ours, theirs), sizes, strict=True)]
    common = {name for name in named[0] if name is not None} & {name for name in named[1] if name is not None}
    number = {name: i for i, name in enumerate(sorted(common, key=lambda name: (isinstance(name, str), name)))}
    found = [[_class(name, number) for name in names] for names in named]
    return Classes(found[0], found[1], len(number) + 1)


def _names(tokenizer: Any, size: int) -> list[bytes | str | None]:
    spelled = spellings(tokenizer)
    names: list[bytes | str | None] = [*spelled[:size], *[None] * (size - len(spelled))]
    for token, id in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True):
        if id < size:
            names[id] = "the end" if id == tokenizer.eos_token_id else token
    return names


def _class(name: bytes | str | None, number: dict[bytes | str, int]) -> int:
    if name in number:
        return number[name]
    if isinstance(name, bytes):
        for length in range(len(name) - 1, 0, -1):
            if name[:length] in number:
                return number[name[:length]]
    return len(number)
