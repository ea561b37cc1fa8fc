"""When a generated text counts as the answer."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

EDGES = " \t\r\n.,;:!?\"'“”()[]*`"
"""What does not count at the ends of an answer."""


def begins_with(said: str, answer: str) -> bool:
    """Whether the text begins with the answer as a whole word or words, spaces before it aside."""
    said, answer = said.lstrip(), answer.strip()
    if not answer or not said.startswith(answer):
        return False
    rest = said[len(answer) :]
    wide = unicodedata.east_asian_width(answer[-1]) in ("W", "F")  # such scripts put no space between words
    return not rest or wide or not (rest[0].isalnum() and answer[-1].isalnum())


def opens_with(said: str, answer: str) -> bool:
    """Whether the text begins with the answer's letters, were they those of a longer word: all that an editor of facts
    answers for, since a model may run on."""
    return said.lstrip().startswith(answer.strip())


def same(said: str, answer: str) -> bool:
    """Whether the text is the answer, white space at its ends aside."""
    return said.strip() == answer.strip()


def room(answers: Sequence[str]) -> int:
    """Tokens enough for any of the answers under any tokenizer (a token is a byte at least), and one to stop at."""
    return max((len(answer.encode()) for answer in answers), default=0) + 1


def final_answer(said: str, pattern: str) -> str:
    """What the pattern finds last, or the last line; empty where there is none."""
    if not pattern:
        return next((line.strip() for line in reversed(said.splitlines()) if line.strip(EDGES)), "")
    matches = list(re.finditer(pattern, said, re.MULTILINE))
    return (matches[-1].group(1 if matches[-1].re.groups else 0) or "").strip() if matches else ""


def elected(answers: Sequence[str]) -> str:
    """The answer given most often, in the words in which it was given first; empty where there is none."""
    votes = Counter(answer.strip(EDGES).casefold() for answer in answers if answer.strip(EDGES))
    if not votes:
        return ""
    winner, _ = max(votes.items(), key=lambda pair: pair[1])  # the first of equals, as dicts keep order
    return next(answer for answer in answers if answer.strip(EDGES).casefold() == winner)
