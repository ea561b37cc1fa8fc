"""Instructions to try: a model is asked to write them, or those that there are get edited."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from lfm.core.heavy import np
from lfm.core.interfaces import Text
from lfm.models.gaps import GAPS
from lfm.prompting.reading import Asked, Reader

SPAN = 3
"""Words that an edit moves or takes away at most."""

SAID = 8
"""Next tokens among which an edit by the model's own words draws."""

LONGEST = 400
"""Letters of an instruction."""

Examples = Sequence[tuple[str, str]]
"""(input, output) pairs."""

Scored = Sequence[tuple[str, float]]
"""(instruction, its score between 0 and 1)."""


def induction(examples: Examples) -> str:
    """A text whose next words are the instruction behind the examples."""
    told = "\n\n".join(f"Input: {given}\nOutput: {answer}" for given, answer in examples)
    return f"Somebody followed one instruction and gave these outputs.\n\n{told}\n\nThe instruction was:"


def improvement(scored: Scored, examples: Examples) -> str:
    """A text whose next words are a better instruction. scored: the best of those tried, shown from worst to best."""
    tried = "\n\n".join(
        f"Instruction: {text}\nScore: {round(100 * value)}" for text, value in sorted(scored, key=lambda pair: pair[1])
    )
    told = "\n\n".join(f"Input: {given}\nOutput: {answer}" for given, answer in examples)
    return (
        f"These instructions were tried; a higher score is better.\n\n{tried}\n\n"
        f"What they should lead to:\n\n{told}\n\n"
        "Write a new instruction that is unlike them and scores higher.\nInstruction:"
    )


def variation(instruction: str) -> str:
    """A text whose next words say the instruction in another way."""
    return f"Say this instruction in other words and keep what it means.\nInstruction: {instruction}\nIn other words:"


def cleaned(said: str) -> str:
    """What was said, as an instruction: its first line with words, without quotes; empty where that is none."""
    line = next((line.strip() for line in said.splitlines() if re.search(r"\w", line)), "")
    line = line.removeprefix("Instruction:").strip().strip("\"'“”`").strip()
    return "" if any(gap in line for gap in GAPS) else line[:LONGEST]


def written(
    text: Text,
    parents: Scored,
    examples: Callable[[int], Examples],
    want: int,
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
) -> list[str]:
    """What the model writes, cleaned: from examples while nothing is scored, else half as improvements and half as
    variations of the parents."""
    if not parents:
        asked = [induction(examples(i)) for i in range(want)]
    else:
        asked = [
            improvement(parents, examples(i)) if i % 2 == 0 else variation(parents[(i // 2) % len(parents)][0])
            for i in range(want)
        ]
    said = text.generate(asked, max_tokens=max_tokens, temperature=temperature, stop=("\n\n",), seed=seed)
    return [cleaned(one) for one in said]


def edited(instruction: str, bank: list[str], reader: Reader | None, draw: random.Random) -> str:
    """One edit by chance: a phrase goes (into the bank), two change places, one comes back from the bank, or a word
    becomes one that the model would say there. reader None: it would say nothing."""
    words = instruction.split()
    ways = ["delete", "swap"] if len(words) > 1 else []
    ways += ["add"] if bank else []
    ways += ["say"] if reader is not None and words else []
    if not ways:
        return instruction
    match draw.choice(ways):
        case "delete":
            start, stop = _span(words, draw, most=len(words) - 1)
            bank.append(" ".join(words[start:stop]))
            words[start:stop] = []
        case "swap":
            a, b = sorted(draw.sample(range(len(words)), 2))
            words[a], words[b] = words[b], words[a]
        case "add":
            place = draw.randint(0, len(words))
            words[place:place] = draw.choice(bank).split()
        case _:
            assert reader is not None
            place = draw.randrange(len(words))
            said = _words(reader, " ".join(words[:place]), " ".join(words[place + 1 :]))
            words[place : place + 1] = [draw.choice(said)] if said else [words[place]]
    return " ".join(words)[:LONGEST]


def _span(words: Sequence[str], draw: random.Random, most: int) -> tuple[int, int]:
    length = draw.randint(1, min(SPAN, most))
    start = draw.randint(0, len(words) - length)
    return start, start + length


def _words(reader: Reader, before: str, after: str) -> list[str]:
    (told,) = reader.best([Asked(before or "\n", f" {after}" if reader.fills else "")], SAID)
    return [word for word in dict.fromkeys(text.strip() for text, _ in told) if word.isalpha()]


def share(scores: Sequence[float]) -> list[float]:
    """Scores of any scale as shares of their range, for a proposer to read."""
    low, high = min(scores), max(scores)
    return [float(v) for v in (np.array(scores) - low) / (high - low)] if high > low else [0.5] * len(scores)
