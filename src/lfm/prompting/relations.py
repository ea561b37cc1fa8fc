"""Prompts of relations: facts' own, mined ones and paraphrases as templates around a subject; and asking by them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, final

from lfm.core.interfaces import Logprobs, Ranked, Score, Text
from lfm.core.model import Model
from lfm.data.records import Fact
from lfm.prompting.reading import WIDE, looked_up

SUBJECT = "{subject}"
WORDS = 12
"""Most words between a subject and its object that are still a prompt."""
SAID = 48
"""Tokens of a paraphrase."""
BULLET = r"(?:[-*•]|\d+[.)])?\s*[\"'“]?"
"""What lists put before what they hold."""


def own(facts: Sequence[Fact]) -> list[str]:
    """The facts' prompts and paraphrases as templates, the commonest first; those without the subject are none."""
    count = Counter(
        prompt.replace(fact.subject, SUBJECT, 1)
        for fact in facts
        for prompt in (fact.prompt, *fact.paraphrases)
        if fact.subject in prompt
    )
    return [template for template, _ in count.most_common()]


def mined(facts: Sequence[Fact], texts: Iterable[str]) -> list[str]:
    """The words between a subject and its object in a sentence, as templates, the commonest first."""
    pairs = [(fact.subject, fact.object) for fact in facts]
    count: Counter[str] = Counter()
    for text in texts:
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            for subject, answer in pairs:
                if subject not in sentence or answer not in sentence:
                    continue
                found = re.search(rf"{re.escape(subject)}(\W.*?)\b{re.escape(answer)}\b", sentence)
                if found and found[1].strip() and len(found[1].split()) <= WORDS:
                    count[SUBJECT + found[1].rstrip()] += 1
    return [template for template, _ in count.most_common()]


def paraphrased(writers: Sequence[Text], templates: Sequence[str], draws: int, seed: int) -> list[str]:
    """Other templates of the same relation, what is said most often first, from so many samples.

    Two writers translate the first template, there and back; one is shown all templates and goes on. What does not
    name the subject, and then the object at its end, each once, is no template.
    """
    shown = [f"{template.replace(SUBJECT, '[X]')} [Y]." for template in templates]
    asked = (
        shown[0] if len(writers) > 1 else "\n- ".join(["The same in other words, of any [X] and [Y]:", *shown]) + "\n-"
    )
    said = [asked] * draws
    for number, writer in enumerate(writers):
        said = writer.generate(said, max_tokens=SAID, temperature=1.0, stop=("\n",), seed=seed + number)
    found = (re.fullmatch(BULLET + r"(.*)\[x\](.*)\[y\]\W*", text.strip(), re.IGNORECASE) for text in said)
    parts = [(one[1], one[2].rstrip()) for one in found if one and not re.search(r"\[[xy]\]", one[1] + one[2], re.I)]
    count = Counter(ahead + SUBJECT + behind for ahead, behind in parts if re.search(r"\w", ahead + behind))
    return [template for template, _ in count.most_common() if template not in templates]


class Spotted(NamedTuple):
    relation: str
    subject: str


def spotted(prompt: str, known: Mapping[str, Sequence[str]]) -> Spotted | None:
    """The relation and the subject that a prompt asks for, by the longest template that it fits; None where none."""
    best: tuple[int, Spotted] | None = None
    for relation, templates in known.items():
        for template in templates:
            ahead, _, behind = template.partition(SUBJECT)
            subject = prompt[len(ahead) : len(prompt) - len(behind)]
            fits = prompt.startswith(ahead) and prompt.endswith(behind) and len(prompt) > len(ahead) + len(behind)
            if fits and not re.search(r"[.!?]\s", subject) and (best is None or len(template) > best[0]):
                best = (len(template), Spotted(relation, subject.strip()))
    return best[1] if best else None


@final
class Ensemble:
    """Known prompts asked in all ways that are kept of their relation, as (template, weight), the logarithms summed."""

    def __init__(
        self, model: Model, kept: Mapping[str, Sequence[tuple[str, float]]], known: Mapping[str, Sequence[str]]
    ) -> None:
        self._model, self._kept, self._known = model, kept, known

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        ways = [self._ways(prompt) for prompt in prompts]
        endings = list(suffixes) or [""] * len(prompts)
        rows = [(text, c, s) for way, c, s in zip(ways, continuations, endings, strict=True) for text, _ in way]
        scores = iter(self._model.ask(Logprobs).score(*map(list, zip(*rows, strict=True)))) if rows else iter(())
        found = []
        for way, continuation in zip(ways, continuations, strict=True):
            each = [next(scores) for _ in way]
            one = len(each) == 1 and way[0][1] == 1.0
            total = sum(weight * score.total for (_, weight), score in zip(way, each, strict=True))
            found.append(each[0] if one else Score((continuation,), (total,)))
        return found

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Ranked]:
        """What a way does not tell has the most that is possible there."""
        ways = [self._ways(prompt) for prompt in prompts]
        endings = list(suffixes) or [""] * len(prompts)
        texts = [text for way in ways for text, _ in way]
        ends = [end for way, end in zip(ways, endings, strict=True) for _ in way]
        told = iter(self._model.ask(Logprobs).top(texts, max(k, WIDE), ends))
        found: list[Ranked] = []
        for way in ways:
            each = [looked_up(next(told)) for _ in way]
            tokens = dict.fromkeys(token for one in each for token in one.exact)
            mixed = {
                token: sum(w * one.exact.get(token, max(one.left, -1e4)) for (_, w), one in zip(way, each, strict=True))
                for token in tokens
            }
            found.append(tuple(sorted(mixed.items(), key=lambda pair: -pair[1])[:k]))
        return found

    def _ways(self, prompt: str) -> list[tuple[str, float]]:
        spot = spotted(prompt, self._known)
        if spot is None or spot.relation not in self._kept:
            return [(prompt, 1.0)]
        return [(template.replace(SUBJECT, spot.subject), weight) for template, weight in self._kept[spot.relation]]
