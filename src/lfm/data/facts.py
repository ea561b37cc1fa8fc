"""Facts as questions with candidate answers: which objects compete, and where the right one ranks.

Ranking among a relation's objects rather than the whole vocabulary lets objects of several tokens, and models that tell
probabilities only of what they are asked, take part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import exp, inf
from typing import NamedTuple

from lfm.core.interfaces import Logprobs, Ranked
from lfm.data.records import Edit, Fact
from lfm.data.wording import spaced


class Question(NamedTuple):
    """A prompt with a blank before its suffix, and what might fill it; no candidate begins with a space of its own."""

    prompt: str
    suffix: str
    candidates: tuple[str, ...]


class Answer(NamedTuple):
    """What was answered, the right object's rank (0: not seen), and the probabilities of both."""

    best: str
    rank: int
    confidence: float
    right: float


def objects(facts: Sequence[Fact]) -> dict[str, tuple[str, ...]]:
    """Each relation's objects, in alphabetical order."""
    found: dict[str, set[str]] = {}
    for fact in facts:
        found.setdefault(fact.relation, set()).add(fact.object)
    return {relation: tuple(sorted(held)) for relation, held in found.items()}


def true_objects(facts: Sequence[Fact]) -> dict[tuple[str, str], set[str]]:
    """All objects of each subject and relation."""
    found: dict[tuple[str, str], set[str]] = {}
    for fact in facts:
        found.setdefault((fact.subject, fact.relation), set()).add(fact.object)
    return found


def questions(facts: Sequence[Fact]) -> list[Question]:
    """One question a fact: its relation's objects compete, less those that are also true of its subject."""
    competing, true = objects(facts), true_objects(facts)
    return [
        Question(
            fact.prompt,
            fact.suffix,
            tuple(
                o for o in competing[fact.relation] if o == fact.object or o not in true[fact.subject, fact.relation]
            ),
        )
        for fact in facts
    ]


def rephrased(fact: Fact | Edit, question: Question) -> list[Question]:
    """The same question by each of the fact's paraphrases."""
    return [question._replace(prompt=prompt) for prompt in fact.paraphrases]


Pair = tuple[str, str, str]
"""(prompt, answer with the space it needs, suffix)."""


def pairs(asked: Sequence[Question]) -> list[Pair]:
    """Every candidate in its prompt, in order and each only once."""
    return list(dict.fromkeys((q.prompt, spaced(q.prompt, c), q.suffix) for q in asked for c in q.candidates))


def score(logprobs: Logprobs, part: Sequence[Pair]) -> list[float]:
    """The log-probability of each answer, all its tokens together."""
    prompts, answers, suffixes = zip(*part, strict=True)
    return [found.total for found in logprobs.score(prompts, answers, suffixes)]


def regrouped(asked: Sequence[Question], told: Mapping[Pair, float]) -> list[tuple[float, ...]]:
    """The scores of each question's candidates."""
    return [tuple(told[q.prompt, spaced(q.prompt, c), q.suffix] for c in q.candidates) for q in asked]


def log_probabilities(
    logprobs: Logprobs, asked: Sequence[Question], *, chunk: int = 256, done: Callable[[int], None] | None = None
) -> list[tuple[float, ...]]:
    """The log-probability of each candidate, all its tokens together. done: told how many more are known."""
    every = pairs(asked)
    told: dict[Pair, float] = {}
    for start in range(0, len(every), chunk):
        part = every[start : start + chunk]
        told.update(zip(part, score(logprobs, part), strict=True))
        if done:
            done(len(part))
    return regrouped(asked, told)


def rank(scores: Sequence[float], right: int) -> int:
    """The place of scores[right] from the best, counted from 1; a tie counts against it."""
    return 1 + sum(1 for i, score in enumerate(scores) if i != right and not score < scores[right])


def best(scores: Sequence[float]) -> int:
    """The place of the highest score, the first of equals."""
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


def among(candidates: Sequence[str], scores: Sequence[float], right: str) -> Answer:
    """The answer by the candidates' log-probabilities; probabilities among them, equal if all are impossible."""
    place, top = candidates.index(right), best(scores)
    odds = [1.0 if scores[top] == -inf else exp(score - scores[top]) for score in scores]
    return Answer(candidates[top], rank(scores, place), odds[top] / sum(odds), odds[place] / sum(odds))


def within(ranked: Ranked, right: str, also: Collection[str]) -> Answer:
    """The answer of a ranking of next tokens, best first. also: objects that are true too and do not compete."""
    words = [token for token, _ in ranked if token.strip().isalpha()]
    capitals = any(word != word.lower() for word in words)  # a vocabulary without them knows objects in lower case
    wanted, *others = [text if capitals else text.lower() for text in (right, *(o for o in also if o != right))]
    kept = [(token.strip(), value) for token, value in ranked if token.strip() not in others]
    first, value = kept[0] if kept else ("", -inf)
    place = next((i for i, (token, _) in enumerate(kept) if token == wanted), None)
    if place is None:
        return Answer(first, 0, exp(value), 0.0)
    ties = sum(other == kept[place][1] for _, other in kept[place + 1 :])
    return Answer(first, place + 1 + ties, exp(value), exp(kept[place][1]))
