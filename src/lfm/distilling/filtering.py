"""Which generated texts are worth learning from: how alike two are, what is wrong with one, where several agree."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import msgspec

from lfm.data.alike import WORD
from lfm.data.answers import EDGES, elected, final_answer

SPAN = 3
"""Words that are counted as said again where they are."""


def words(text: str) -> tuple[str, ...]:
    """Words in lower case; a letter each of scripts that put no space between words."""
    found: list[str] = []
    for word in WORD.findall(text.lower()):
        wide = any(unicodedata.east_asian_width(letter) in ("W", "F") for letter in word)
        found.extend(word if wide else [word])
    return tuple(found)


def common(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence, a word of b at a time: each step is one addition of long integers.

    Bit i of `row` is 0 where the subsequence of a[: i + 1] is longer by one than that of a[:i] (Hyyrö, 2004).
    """
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    whole = (1 << len(a)) - 1
    row = whole
    for word in b:
        hit = row & places.get(word, 0)
        row = ((row + hit) | (row - hit)) & whole
    return len(a) - row.bit_count()


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """ROUGE-L (Lin, 2004): F₁ of the longest common subsequence of words, 2 LCS / (|a| + |b|), between 0 and 1."""
    return 2 * common(a, b) / (len(a) + len(b)) if a and b else 0.0


def new(texts: Sequence[str], known: Sequence[str], alike: float) -> list[int]:
    """The places of texts whose ROUGE-L with all that is known, and with each one taken before, is below `alike`.

    Texts that differ in capitals and spaces alone are one. With alike = 1 no others are left out: signs may be all that
    tells 1 + 2 from 1 − 2. Below 1 time grows with the square of how many there are.
    """
    pool = [(told, Counter(told)) for told in map(words, known)]
    seen = {tuple(text.lower().split()) for text in known}
    taken: list[int] = []
    for place, text in enumerate(texts):
        same = tuple(text.lower().split())
        if same in seen:
            continue
        seen.add(same)
        if alike >= 1:
            taken.append(place)
            continue
        told = words(text)
        counts = Counter(told)
        # no subsequence is longer than what both have of each word, and most pairs have little
        near = (
            other
            for other, count in pool
            if 2 * (counts & count).total() >= alike * (len(told) + len(other)) and rouge_l(told, other) >= alike
        )
        if next(near, None) is None:
            taken.append(place)
            pool.append((told, counts))
    return taken


def repeats(text: str) -> float:
    """The share of a text's spans of three words that it has said before."""
    told = words(text)
    spans = [told[i : i + SPAN] for i in range(len(told) - SPAN + 1)]
    return 1 - len(set(spans)) / len(spans) if spans else 0.0


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer must be. shortest, longest: words; longest 0: any. repeats: most of its spans said before. ends:
    a regular expression of its last letters; empty: any."""

    shortest: int = 0
    longest: int = 0
    repeats: float = 1.0
    ends: str = ""


def fault(answer: str, rules: Rules) -> str:
    """What is wrong with an answer, in a word; empty where nothing is."""
    count = len(words(answer))
    if not answer.strip():
        return "empty"
    if count < rules.shortest:
        return "short"
    if rules.longest and count > rules.longest:
        return "long"
    if repeats(answer) > rules.repeats:
        return "repeating"
    if rules.ends and not re.search(f"(?:{rules.ends})\\Z", answer.rstrip()):
        return "unfinished"
    return ""


def agreeing(answers: Sequence[str], pattern: str, least: float) -> list[bool]:
    """Which answers come to what most of them come to (2203.11171); none where less than a share `least` of them does.

    What an answer comes to is what the pattern finds last in it, or its last line without one.
    """
    finals = [final_answer(answer, pattern) for answer in answers]
    winner = elected(finals).strip(EDGES).casefold()
    same = [bool(winner) and final.strip(EDGES).casefold() == winner for final in finals]
    return same if sum(same) >= least * len(answers) else [False] * len(answers)


def distinct(texts: Sequence[str]) -> float:
    """The share of pairs of neighbouring words, over all texts, that are different ones (distinct-2, 1510.03055)."""
    pairs = [pair for text in texts for pair in pairwise(words(text))]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
