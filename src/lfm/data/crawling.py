"""How a model is asked what it knows of a subject: which relations, in which words, and what its answers name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, final

from lfm.core.errors import ConfigError, DataError
from lfm.core.interfaces import Text
from lfm.core.method import Run
from lfm.data.records import Fact

UNKNOWN = "Don't know"


class Asked(NamedTuple):
    """A prompt about a subject's relation, and what ends an answer to it."""

    relation: str
    prompt: str
    end: str


class Answered(NamedTuple):
    """One candidate object: how often it was named among so many answers, and how far from a seed."""

    subject: str
    relation: str
    object: str
    named: int
    answers: int
    prompt: str
    depth: int

    @property
    def confidence(self) -> float:
        return self.named / self.answers


class Settings(Protocol):
    """How often each prompt is sent, and how many may be in all."""

    @property
    def samples(self) -> int: ...

    @property
    def temperature(self) -> float: ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def queries(self) -> int: ...


@final
class Speaker:
    """The model, every prompt to it counted."""

    def __init__(self, config: Settings, text: Text, run: Run) -> None:
        self.used = 0
        self._config, self._text, self._run = config, text, run

    def fits(self, prompts: int) -> bool:
        """Whether so many may still be sent."""
        return self.used + prompts * (1 + self._config.samples) <= self._config.queries

    def answers(self, name: str, questions: Sequence[Asked]) -> list[list[str]]:
        """What is answered to each question, greedily and then in samples."""
        config, prompts = self._config, [question.prompt for question in questions]
        ends = tuple(dict.fromkeys(["\n", *(question.end for question in questions if question.end)]))

        def ask() -> list[list[str]]:
            told = [self._text.generate(prompts, max_tokens=config.max_tokens, stop=ends)]
            for i in range(config.samples):
                seed = self._run.seed_for(name, i)
                told.append(
                    self._text.generate(
                        prompts, max_tokens=config.max_tokens, temperature=config.temperature, stop=ends, seed=seed
                    )
                )
            return [list(each) for each in zip(*told, strict=True)]

        self.used += len(prompts) * (1 + config.samples)
        told = self._run.step(name, ask)
        return [[clean(text, question.end) for text in each] for question, each in zip(questions, told, strict=True)]


def clean(text: str, end: str) -> str:
    """An answer without what follows it."""
    for mark in ("\n", end):
        text = text.split(mark)[0] if mark else text
    return " ".join(text.split()).strip(" .,;:")


def tally(subject: str, depth: int, questions: Sequence[Asked], answers: Sequence[Sequence[str]]) -> list[Answered]:
    """Of each relation every object that was named, the most frequent first. An answer may name several, by #; one that
    names none, or that it does not know, counts against all."""
    counts: dict[str, Counter[str]] = {}
    asked: Counter[str] = Counter()
    first: dict[str, str] = {}
    for question, told in zip(questions, answers, strict=True):
        first.setdefault(question.relation, question.prompt)
        for answer in told:
            asked[question.relation] += 1
            named = dict.fromkeys(part.strip() for part in answer.split("#"))
            held = [one for one in named if one and one.lower() != UNKNOWN.lower()]
            counts.setdefault(question.relation, Counter()).update(held)
    return [
        Answered(subject, relation, one, times, asked[relation], first[relation], depth)
        for relation, named in counts.items()
        for one, times in sorted(named.items(), key=lambda item: (-item[1], item[0]))
    ]


class Asker(NamedTuple):
    """about: (subject, the relation that led to it, if any) → its questions. shown: facts that prompts give away."""

    about: Callable[[str, str | None], list[Asked]]
    shown: Sequence[Fact] = ()


def given(facts: Sequence[Fact], most: int) -> Asker:
    """The facts' own relations, in their own words (`most` a relation), of subjects of the kind that they have there.

    DataError where no prompt names its subject.
    """
    wordings: dict[str, dict[str, str]] = {}
    relations: dict[str, set[str]] = {}
    for fact in facts:
        relations.setdefault(fact.subject, set()).add(fact.relation)
        held = wordings.setdefault(fact.relation, {})
        for prompt in (fact.prompt, *fact.paraphrases):
            if fact.subject in prompt and len(held) < most:
                held.setdefault(prompt.replace(fact.subject, "{s}"), fact.suffix)
    if not any(wordings.values()):
        raise DataError(
            "no fact's prompt names its subject", why="relations are asked in their words", fix="give such facts"
        )
    kinds = {name: kind(name, relations) for name in relations}
    leads = {fact.relation: kinds[fact.object] for fact in facts if fact.object in kinds}

    def about(subject: str, through: str | None) -> list[Asked]:
        unmet = frozenset(wordings) if through is None else leads.get(through, frozenset())
        return [
            Asked(relation, wording.replace("{s}", subject), end)
            for relation, held in wordings.items()
            if relation in kinds.get(subject, unmet)
            for wording, end in held.items()
        ]

    return Asker(about)


def kind(name: str, relations: Mapping[str, set[str]]) -> frozenset[str]:
    """The relations of all subjects that share one, directly or by others, with this one."""
    found = set(relations[name])
    while more := {r for held in relations.values() if held & found for r in held} - found:
        found |= more
    return frozenset(found)


def asked(facts: Sequence[Fact], count: int, wordings: int, speaker: Speaker) -> Asker:
    """Relations and objects that the model names after `count` examples. Each of these is asked first, after the
    others: what is answered wrongly is not known. ConfigError where the queries do not last for that."""
    step = max(1, len(facts) // count)
    shown = list(dict.fromkeys(facts[::step]))[:count]
    questions = [
        Asked("", examples(shown, frozenset(), without=i) + f"Q: {fact.subject} # {fact.relation}\nA:", "")
        for i, fact in enumerate(shown)
    ]
    if not speaker.fits(len(questions)):
        raise ConfigError("the budget of queries is spent on examples alone", fix="more queries, or fewer examples")
    greedy = [told[0] for told in speaker.answers("examples", questions)]
    missed = frozenset(i for i, (fact, told) in enumerate(zip(shown, greedy, strict=True)) if fact.object != told)
    unknown = missed if len(missed) < len(shown) else frozenset()
    held: dict[str, list[str]] = {}
    for fact in shown:
        held.setdefault(fact.subject, []).append(fact.relation)
    before = "".join(f"Q: {name}\nA: {' # '.join(dict.fromkeys(r))}\n\n" for name, r in held.items())

    def about(subject: str, through: str | None) -> list[Asked]:
        question = Asked("", f"{before}Q: {subject}\nA:", "")
        if not speaker.fits(1):
            return [question]  # which will not be sent either
        told = speaker.answers(f"relations of {subject}", [question])[0]
        named = dict.fromkeys(part.strip() for answer in told for part in answer.split("#"))
        return [
            Asked(relation, examples(shown, unknown, turn) + f"Q: {subject} # {relation}\nA:", "")
            for relation in named
            if relation and relation.lower() != UNKNOWN.lower()
            for turn in range(wordings)
        ]

    return Asker(about, shown)


def examples(shown: Sequence[Fact], unknown: frozenset[int], turn: int = 0, without: int = -1) -> str:
    """The facts as questions and answers, begun at another one each turn. unknown: places of those not known."""
    order = [(i + turn) % len(shown) for i in range(len(shown))]
    return "".join(
        f"Q: {shown[i].subject} # {shown[i].relation}\nA: {UNKNOWN if i in unknown else shown[i].object}\n\n"
        for i in order
        if i != without
    )
