"""What a model says at each of many places, as one table over words: any words are looked up there at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lfm.core.heavy import np
from lfm.core.interfaces import Ranked
from lfm.data.wording import spaced
from lfm.prompting.reading import Reader, looked_up
from lfm.prompting.template import Asked

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Vocabulary(NamedTuple):
    """words, and the probability (n, words) of each at each place: in the middle of what is possible where untold."""

    words: tuple[str, ...]
    share: NDArray[np.float64]


def vocabulary(reader: Reader, asked: Sequence[Asked], *, most: int) -> Vocabulary:
    """The `most` words that are likeliest in the mean, of those that are told at any place.

    A word is a token of letters, as it would follow the prompt: a part of a word is none, where tokens tell.
    """
    told = reader.best(asked, reader.wide)
    marked = any(text[:1] == " " and text.strip() for ranked in told for text, _ in ranked)
    rows = [spoken(ranked, one.prompt, marked=marked) for ranked, one in zip(told, asked, strict=True)]
    words = sorted({word for row in rows for word in row})
    place = {word: i for i, word in enumerate(words)}
    share = np.stack([np.full(len(words), np.exp(looked_up(ranked).left) / 2) for ranked in told])
    for values, row in zip(share, rows, strict=True):
        values[[place[word] for word in row]] = list(row.values())
    kept = np.sort(np.argsort(-share.mean(0), kind="stable")[:most])
    return Vocabulary(tuple(words[i] for i in kept), share[:, kept])


def spoken(told: Ranked, prompt: str, *, marked: bool) -> Mapping[str, float]:
    """Words and their probabilities. marked: tokens tell by a space that they begin a word."""
    found: dict[str, float] = {}
    for text, value in told:
        word = text.strip()
        if word.isalpha() and (not marked or text == spaced(prompt, word)):
            found.setdefault(word, float(np.exp(value)))
    return found
