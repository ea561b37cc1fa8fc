"""Texts and conditions to practise on: does what a condition says hold of a text, and how would the text read if it
said something else in one place?"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lfm.core.errors import DataError
from lfm.core.heavy import torch
from lfm.core.method import Run
from lfm.data.records import Label

NOUNS = ("text", "review", "story", "message")
SAYS = ('the {noun} says "{what}"', 'the {noun} mentions "{what}"', 'the {noun} contains "{what}"')
IS = ("{one} is described as {what}", "{one} is {what}", "{one} was {what}")
COPULA = re.compile(r"^(\S+(?: \S+){0,3}) (?:is|was|are|were) (\S+(?: \S+){0,4}?)[.!?]*$")
STARTS, VOWELS, ENDS = "bdfgklmnprstvz", "aeiou", ("", "b", "g", "k", "n", "r", "sh", "x")
WIDE = 4
"""Most words that a condition asks for."""
CLAIMS = ("It was {}.", "All was {}.", "It felt {}.", "They called it {}.")


class Lesson(NamedTuple):
    """Whether the condition holds of the text. consequence: what is to be read in place of the one sentence that the
    text has of made-up words, and instead: the text that has it there; both empty where there is none."""

    condition: str
    text: str
    applies: bool
    consequence: str = ""
    instead: str = ""


def sentences(text: str) -> list[str]:
    """The text's sentences, stops and all."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def drawn(texts: Sequence[Label], count: int, run: Run, name: str) -> list[Lesson]:
    """So many lessons, every other one of a condition that holds. Of three one is of words that no text has (of which
    only the condition can tell anything, as in 2211.03318), one of the text's own words, and one of what a sentence
    says that something is. DataError where the texts are too few or too short."""
    split = [parts for parts in (sentences(record.text) for record in texts) if len(" ".join(parts).split()) > WIDE]
    if len(split) < 2:
        raise DataError(
            f"{len(split)} texts are long enough to practise on",
            why="conditions are made of their words",
            fix="give labelled texts of several words each as train=FILE",
        )
    said = [found.groups() for parts in split for part in parts if (found := COPULA.match(part))]
    made: list[Lesson] = []
    for number in range(count):
        draw = run.generator(name, number)
        pick = picking(draw)
        parts, holds = split[pick(len(split))], number % 2 == 0
        kind = number // 2 % 3
        own = [found.groups() for part in parts if (found := COPULA.match(part))]
        if kind == 0:
            made.append(_made_up(parts, split[pick(len(split))], holds, pick))
        elif kind == 1 and own and len(set(said)) > 1:
            made.append(_described(parts, own[pick(len(own))], said, holds, pick))
        else:
            made.append(_quoted(parts, split, holds, pick))
    return made


Pick = Callable[[int], int]


def picking(draw: torch.Generator) -> Pick:
    """A number below the one given, at random."""
    return lambda below: int(torch.randint(below, (), generator=draw))


def word(pick: Pick) -> str:
    """A word that is none."""
    syllables = [STARTS[pick(len(STARTS))] + VOWELS[pick(len(VOWELS))] for _ in range(2 + pick(2))]
    return "".join(syllables) + ENDS[pick(len(ENDS))]


def _asked(what: str, pick: Pick) -> str:
    return SAYS[pick(len(SAYS))].format(noun=NOUNS[pick(len(NOUNS))], what=what)


def _made_up(parts: Sequence[str], others: Sequence[str], holds: bool, pick: Pick) -> Lesson:
    """Some of the sentences, and one of made-up words."""
    here, other = (" ".join(word(pick) for _ in range(1 + pick(2))) for _ in range(2))
    kept = [part for part in parts if pick(2)]
    place, claim = pick(len(kept) + 1), CLAIMS[pick(len(CLAIMS))].format(here)

    def with_(sentence: str) -> str:
        return " ".join([*kept[:place], sentence, *kept[place:]])

    what = here if holds else other
    if pick(2):
        condition = _asked(what, pick)
    else:
        condition = IS[pick(len(IS))].format(one=("it", "all", NOUNS[pick(len(NOUNS))])[pick(3)], what=what)
    consequence = others[pick(len(others))]
    return Lesson(condition, with_(claim), holds, consequence, with_(consequence))


def _quoted(parts: Sequence[str], split: Sequence[Sequence[str]], holds: bool, pick: Pick) -> Lesson:
    """Words of the text; or words that it has not, half of them its own but for one."""
    text = " ".join(parts)
    span = _span(text, pick)
    for _ in range(20):
        if holds or span not in text:
            break
        away = _span(" ".join(split[pick(len(split))]), pick).split()
        near = _span(text, pick).split()
        if pick(2) and len(near) > 1:
            near[pick(len(near))] = away[0]
            away = near
        span = " ".join(away)
    return Lesson(_asked(span, pick), text, span in text)


def _span(text: str, pick: Pick) -> str:
    words = text.split()
    long = 1 + pick(min(WIDE, len(words)))
    first = pick(len(words) - long + 1)
    return " ".join(words[first : first + long]).strip(".,;:!?\"'") or words[first]


def _described(
    parts: Sequence[str], own: tuple[str, ...], said: Sequence[tuple[str, ...]], holds: bool, pick: Pick
) -> Lesson:
    """What a sentence says that something is; or what another says, of this or of something else."""
    one, what = own
    for _ in range(20):
        if holds or not any((one, what) == found.groups() for part in parts if (found := COPULA.match(part))):
            break
        other = said[pick(len(said))]
        one, what = (own[0], other[1]) if pick(2) else (other[0], own[1])
    holds = any((one, what) == found.groups() for part in parts if (found := COPULA.match(part)))
    return Lesson(IS[pick(len(IS))].format(one=one, what=what), " ".join(parts), holds)
