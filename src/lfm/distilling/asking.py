"""Asking a model for texts to learn from. A run that is killed pays for no answer twice, but those under way."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from lfm.core import Run
from lfm.core.interfaces import Said, Text, said_by
from lfm.core.method import RECORDS
from lfm.data.files import write
from lfm.data.records import Record
from lfm.distilling import filtering

CHUNK = 64
"""Questions that are one step of a run."""

ROUND = 8
"""Requests for new prompts that are made at once: each is shown what those before came to."""

TRIES = 2
"""Requests for each new prompt that is wanted, at most."""

OWN = 4
"""One in so many of the prompts shown is a new one, once there are some: 2 of 8 in the paper."""

LONGEST = 150
"""Words of a new prompt (2212.10560 leaves out longer instructions)."""

Say = Callable[[Sequence[str], int], list[Said]]
"""(prompts, seed) → what is said after each, and whether it was cut."""


def saying(text: Text, *, max_tokens: int, temperature: float, stop: Sequence[str]) -> Say:
    """A model of text with its settings."""
    return lambda prompts, seed: said_by(
        text, prompts, max_tokens=max_tokens, temperature=temperature, stop=stop, seed=seed
    )


def answered(say: Say, prompts: Sequence[str], run: Run, name: str, count: int = 1) -> list[list[Said]]:
    """`count` answers to each prompt. Every 64 questions are a step of the run."""
    asked = [prompt for prompt in prompts for _ in range(count)]
    said: list[Said] = []
    for first in run.track(range(0, len(asked), CHUNK), name):
        part = asked[first : first + CHUNK]
        kept = run.once(f"{name} {first}", lambda part=part, first=first: say(part, run.seed_for(name, first)))
        said += [Said(*one) for one in kept]
    return [said[i : i + count] for i in range(0, len(said), count)]


def synthesised(say: Say, given: Sequence[str], want: int, run: Run, *, shown: int, alike: float) -> list[str]:
    """New prompts, as Self-Instruct has them (2212.10560): a list of some is shown, and the model goes on with it.

    Three in four of those shown are given ones, the others new ones. One is new whose ROUGE-L with each prompt so far
    is below `alike`. After two requests for each that is wanted it gives up: there may be fewer.
    """
    found: list[str] = []
    for number in run.track(range(0, requests(want), ROUND), "new prompts"):
        if len(found) >= want:
            break
        asked = [request(_shown(given, found, shown, run.seed_for("shown", number + i))) for i in range(ROUND)]
        said = run.once(
            f"new prompts {number}",
            lambda asked=asked, number=number: [one.text for one in say(asked, run.seed_for("new prompts", number))],
        )
        listed = [prompt for one in said for prompt in items(one) if len(filtering.words(prompt)) <= LONGEST]
        found += [listed[i] for i in filtering.new(listed, [*given, *found], alike)]
    return found[:want]


def requests(want: int) -> int:
    """The most requests that so many new prompts take."""
    return -(-TRIES * want // ROUND) * ROUND


def _shown(given: Sequence[str], found: Sequence[str], count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    own = draw.sample(list(found), min(len(found), count // OWN))
    chosen = draw.sample(list(given), min(len(given), count - len(own))) + own
    draw.shuffle(chosen)
    return chosen


def request(shown: Sequence[str]) -> str:
    """A text whose next words are more prompts."""
    told = "\n".join(f"{i}. {' '.join(prompt.split())}" for i, prompt in enumerate(shown, start=1))
    return f"A list of questions and tasks of one kind, each different from the others:\n\n{told}\n{len(shown) + 1}."


def reading(shown: int, length: float, finer: float) -> float:
    """About how many tokens a request is that shows so many prompts of so many: its own words and numbers are some too.

    finer: how many times as many of them there are as of 4 bytes each.
    """
    return finer * (20 + 3 * shown) + shown * length


def items(said: str) -> list[str]:
    """The prompts in what a model went on with. Of several the last is left out: nobody knows whether it was cut."""
    parts = re.split(r"\n\s*\d+[.)]", "\n" + re.sub(r"^\s*\d+[.)]", "", said))
    lines = [next((line.strip() for line in part.splitlines() if line.strip()), "") for part in parts]
    kept = lines[:-1] if len(lines) > 1 else lines
    return [line for line in kept if line]


def leave(records: Sequence[Record], run: Run) -> None:
    """Have these records go with what a run makes, as a file that other methods take."""
    scratch = run.work / "scratch"
    scratch.mkdir(exist_ok=True)
    write(records, scratch / RECORDS)
