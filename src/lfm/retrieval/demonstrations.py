"""Examples that go before a prompt: which ones, by how alike they are; and text and scores of a model told them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, final

from lfm.core.interfaces import Codec, Features, Logprobs, Ranked, Said, Score, Text, said_by
from lfm.core.method import Parts
from lfm.core.model import Model
from lfm.data.alike import by_words
from lfm.data.wording import spaced
from lfm.models.language import cut
from lfm.models.vectors import pooled

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.data.records import Edit

KINDS = {"copy": 1, "update": 3, "retain": 4}
"""Kinds of examples of a changed fact (2305.12740), and how many of each there are to the others."""
END = "\n\n"
"""What ends an example, and so an answer."""
HEADING = "New Fact: {fact}\nPrompt: "


class Example(NamedTuple):
    kind: str
    subject: str
    text: str


def fact_of(edit: Edit) -> str:
    return edit.prompt + spaced(edit.prompt, edit.new_object)


def examples_of(edit: Edit) -> list[Example]:
    """All examples that an edit can give: itself, its paraphrases, its neighbours."""
    fact = fact_of(edit)
    said = [("copy", fact)]
    said += [("update", prompt + spaced(prompt, edit.new_object)) for prompt in edit.paraphrases]
    said += [("retain", prompt + spaced(prompt, answer)) for prompt, answer in edit.neighbours]
    return [Example(kind, edit.subject, HEADING.format(fact=fact) + text) for kind, text in said]


def shares(k: int) -> dict[str, int]:
    """How many examples of each kind, by largest remainder; of equal ones the later kind first."""
    whole = sum(KINDS.values())
    counts = {kind: k * part // whole for kind, part in KINDS.items()}
    rest = sorted(KINDS, key=lambda kind: (-(k * KINDS[kind] % whole), -KINDS[kind]))
    for kind in rest[: k - sum(counts.values())]:
        counts[kind] += 1
    return counts


def embedded(retriever: Model, texts: Sequence[str]) -> Tensor:
    """(N, width) unit vectors: each text's last hidden states in the mean."""
    return pooled(retriever.ask(Codec), retriever.ask(Features), texts)


def embeddings(
    retriever: Sequence[Model], told: Sequence[Sequence[str]], examples: Sequence[Example]
) -> dict[str, Tensor]:
    """What a program with a retriever keeps: one vector a fact and one an example."""
    if not retriever:
        return {}
    texts = {"facts": [fact for _, fact in told], "examples": [example.text for example in examples]}
    return {name: embedded(retriever[0], some) for name, some in texts.items()}


@final
class Contexts:
    """What goes before a prompt."""

    def __init__(self, parts: Parts, k: int, *, everywhere: bool) -> None:
        """parts: models "model" and perhaps "retriever"; state "facts" [[subject, fact]] and "examples"; tensors as
        `embeddings` makes them, with a retriever. everywhere: before prompts that name no subject too.
        """
        self.parts, self._k, self._everywhere = parts, k, everywhere
        self._facts = [(str(subject), str(fact)) for subject, fact in parts.state["facts"]]
        self._examples = [Example(*example) for example in parts.state["examples"]]

    @cached_property
    def _words(self) -> dict[str, Callable[[str], list[float]]]:
        texts = {"facts": [fact for _, fact in self._facts], "examples": [e.text for e in self._examples]}
        return {name: by_words(some) for name, some in texts.items()}

    def _alike(self, query: str, name: str) -> list[float]:
        if self.parts.models.get("retriever"):
            return (self.parts.tensors[name] @ embedded(self.parts.model("retriever"), [query])[0]).tolist()
        return self._words[name](query)

    def before(self, prompt: str) -> str:
        """The examples and the new fact, or nothing where no edit is about the prompt."""
        near = list(range(len(self._facts)))
        if not self._everywhere:
            near = [i for i in near if self._facts[i][0].lower() in prompt.lower()]
        if not near:
            return ""
        alike = self._alike(prompt, "facts") if len(near) > 1 else [0.0] * len(self._facts)
        subject, fact = self._facts[max(near, key=lambda i: (alike[i], -i))]
        asked = HEADING.format(fact=fact)
        return "".join(example.text + END for example in self._chosen(subject, asked + prompt)) + asked

    def _chosen(self, subject: str, asked: str) -> list[Example]:
        if not self._k:
            return []
        alike = self._alike(asked, "examples")
        order = sorted(range(len(alike)), key=lambda i: (-alike[i], i))
        order = [i for i in order if self._examples[i].subject != subject]
        kept: list[int] = []
        for kind, count in shares(self._k).items():
            kept += [i for i in order if self._examples[i].kind == kind][:count]
        return [self._examples[i] for i in sorted(kept, key=lambda i: (alike[i], -i))]


@final
class ToldText:
    """The model's text, told what goes before; an answer of a told prompt ends where an example would."""

    def __init__(self, contexts: Contexts) -> None:
        self._contexts = contexts

    def generate(self, prompts: Sequence[str], **how: Any) -> list[str]:
        return [one.text for one in self.said(prompts, **how)]

    def said(self, prompts: Sequence[str], **how: Any) -> list[Said]:
        before = [self._contexts.before(prompt) for prompt in prompts]
        asked = [told + prompt for told, prompt in zip(before, prompts, strict=True)]
        said = said_by(self._contexts.parts.model("model").ask(Text), asked, **how)
        return [_ended(one) if told else one for told, one in zip(before, said, strict=True)]


def _ended(said: Said) -> Said:
    """What was said up to the end of an example; where that came, nothing cut it."""
    text = cut(said.text, (END,))
    return Said(text, said.cut and text == said.text)


@final
class ToldLogprobs:
    """The model's probabilities, told what goes before."""

    def __init__(self, contexts: Contexts) -> None:
        self._contexts = contexts

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        return self._asked().score(self._told(prompts), continuations, suffixes)

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Ranked]:
        return self._asked().top(self._told(prompts), k, suffixes)

    def _asked(self) -> Logprobs:
        return self._contexts.parts.model("model").ask(Logprobs)

    def _told(self, prompts: Sequence[str]) -> list[str]:
        return [self._contexts.before(prompt) + prompt for prompt in prompts]
