"""A classifier made of prompts: each reads its classes from words, and all are put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, final

import msgspec

from lfm.core.errors import ConfigError, DataError
from lfm.core.heavy import np
from lfm.core.interfaces import Classes, Logprobs, Ranked, Score, Text
from lfm.core.method import Sizes
from lfm.core.model import Model
from lfm.data.records import Label, Pair
from lfm.prompting.reading import Reader, Told
from lfm.prompting.template import checked, filled

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEAST = 1e-12
"""Probability under which none is taken, where a logarithm is."""

Combine = Literal["mean", "product", "vote"]
"""How prompts are put together: the weighted mean of their probabilities, or of the logarithms, or their votes."""


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One way to ask. words: each class's, in the classifier's order. before: what stands ahead of it (demonstrations).

    prior: natural-log probabilities of the classes that are divided out, none where it is empty. whole: each word is
    known to be one token of the model.
    """

    words: tuple[tuple[str, ...], ...]
    template: str = ""
    before: str = ""
    weight: float = 1.0
    prior: tuple[float, ...] = ()
    whole: bool = False


class Read(NamedTuple):
    """(n, classes) natural-log probabilities, and whether (n,) what is not told could change the likeliest class."""

    logp: NDArray[np.float64]
    doubtful: NDArray[np.bool_]


@final
class Classifier(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts that are put together: all that such a program keeps beside its model."""

    labels: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    combine: Combine = "mean"


def verbalizer(labels: Sequence[str], words: Mapping[str, Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """Each label's words: those given, else the label itself. ConfigError for a word of two labels, or of none."""
    if unknown := sorted(words.keys() - set(labels)):
        raise ConfigError(f"words are given for {', '.join(unknown)}", why=f"the labels are {', '.join(labels)}")
    found = tuple(tuple(words.get(label) or (label,)) for label in labels)
    spoken = [word for group in found for word in group]
    if twice := sorted({word for word in spoken if spoken.count(word) > 1}):
        raise ConfigError(f"{', '.join(map(repr, twice))} speaks for two labels", fix='words={"label": ["word", …], …}')
    if any(not word.strip() for word in spoken):
        raise ConfigError("a label's word is empty", fix='words={"label": ["word", …], …}')
    return found


def questions(sizes: Sizes, words: Mapping[str, Sequence[str]]) -> int:
    """What a prompt asks of a record: each word where the model scores words, else once, whatever the words."""
    gives = sizes.gives.get("model")
    if gives and Logprobs not in gives[0]:
        return 1
    labels = max(2, len(words), *sizes.labels.values())
    return labels - len(words) + sum(map(len, words.values()))


def read(reader: Reader, prompt: Prompt, records: Sequence[Label | Pair]) -> Read:
    """One prompt's classes: P(class) ∝ Σ of its words' probabilities, divided by the prior's.

    A record of which no word is told is of every class alike. ConfigError for a template that the model cannot read.
    """
    checked(prompt.template, fills=reader.fills)
    words = [word for group in prompt.words for word in group]
    asked = [filled(prompt.template, record, before=prompt.before) for record in records]
    told = reader.words(asked, words, whole=prompt.whole)
    return classes(told, [len(group) for group in prompt.words], prompt.prior)


def classes(told: Told, counts: Sequence[int], prior: Sequence[float] = ()) -> Read:
    """Words' bounds as classes, of which each has the next `counts` words."""
    ends = np.cumsum([0, *counts])
    divided = np.exp(-np.array(prior)) if len(prior) else np.ones(len(counts))

    def summed(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([values[:, a:b].sum(1) for a, b in pairwise(ends)], axis=1) * divided

    low, share, high = summed(np.exp(told.low)), summed(told.share), summed(np.exp(told.high))
    total = share.sum(1, keepdims=True)
    even = np.full_like(share, 1 / share.shape[1])
    logp = np.log(np.where(total > 0, share / np.where(total > 0, total, 1.0), even).clip(LEAST))
    best = logp.argmax(1)
    rows = np.arange(len(best))
    others = high.copy()
    others[rows, best] = -1.0
    doubtful = (others.max(1) >= low[rows, best]) & (low != high).any(1) | (total[:, 0] <= 0)
    return Read(logp, doubtful)


def combined(each: Sequence[NDArray[np.float64]], weights: Sequence[float], combine: Combine) -> NDArray[np.float64]:
    """(n, classes) natural-log probabilities from several prompts'. A vote goes to a prompt's likeliest class."""
    shares = np.array(weights, dtype=np.float64)
    shares = shares / shares.sum() if shares.sum() > 0 else np.full(len(shares), 1 / len(shares))
    stacked = np.stack(each)
    if combine == "product":
        mixed = np.tensordot(shares, stacked, 1)
    else:
        votes = np.eye(stacked.shape[-1])[stacked.argmax(-1)] if combine == "vote" else np.exp(stacked)
        mixed = np.log(np.tensordot(shares, votes, 1).clip(LEAST))
    return mixed - np.logaddexp.reduce(mixed, axis=1, keepdims=True)


def tell(reader: Reader, classifier: Classifier, records: Sequence[Label | Pair]) -> Read:
    """What the classifier tells of the records."""
    each = [read(reader, prompt, records) for prompt in classifier.prompts]
    weights = [prompt.weight for prompt in classifier.prompts]
    logp = combined([one.logp for one in each], weights, classifier.combine)
    return Read(logp, np.any([one.doubtful for one in each], axis=0))


def accuracy(read: Read | NDArray[np.float64], labels: Sequence[str], records: Sequence[Label | Pair]) -> float:
    """The share of records whose likeliest class is their label."""
    logp = read.logp if isinstance(read, Read) else read
    return float(np.mean([labels[i] == record.label for i, record in zip(logp.argmax(1), records, strict=True)]))


def labels_of(*groups: Sequence[Label | Pair]) -> tuple[str, ...]:
    """The records' labels, sorted. DataError unless there are two at least."""
    found = tuple(sorted({record.label for records in groups for record in records}))
    if len(found) < 2:
        raise DataError(
            f"all records have the label {found[0]!r}" if found else "no record has a label",
            why="a prompt is chosen to tell labels apart",
        )
    return found


def interfaces(model: Model, classifier: Classifier) -> Mapping[type, Callable[[], Any]]:
    """What a prompted model gives: its classes, and for whoever reads text alone, their names as what comes next."""
    return spoken(PromptedClasses(model, classifier))


def spoken(opened: Classes) -> Mapping[type, Callable[[], Any]]:
    """What tells classes as a model: these, and their names as what comes next."""
    return {Classes: lambda: opened, Text: lambda: Spoken(opened), Logprobs: lambda: Spoken(opened)}


@final
class PromptedClasses:
    """Classes by prompts."""

    def __init__(self, model: Model, classifier: Classifier) -> None:
        self._model, self._classifier = model, classifier

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self._model)

    @property
    def labels(self) -> tuple[str, ...]:
        return self._classifier.labels

    def tell(self, records: Sequence[Any]) -> NDArray[np.float64]:
        return tell(self._reader, self._classifier, records).logp


@final
class Spoken:
    """A classifier of texts as a model of text: what comes after a text is a class's name."""

    def __init__(self, classes: Classes) -> None:
        self._classes = classes

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[str]:
        told = self._tell(prompts)
        if temperature > 0:
            random = np.random.default_rng(seed)
            told = told / temperature + random.gumbel(size=told.shape)
        return [f" {self._classes.labels[i]}" for i in told.argmax(1)]

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        """Log-probability of each continuation as a class's name; −∞ for what names none."""
        told = self._tell(prompts)
        place = {label: i for i, label in enumerate(self._classes.labels)}
        values = [
            float(row[place[said.strip()]]) if said.strip() in place else float("-inf")
            for row, said in zip(told, continuations, strict=True)
        ]
        return [Score((said,), (value,)) for said, value in zip(continuations, values, strict=True)]

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Ranked]:
        names = [f" {label}" for label in self._classes.labels]
        return [
            tuple(sorted(zip(names, map(float, row), strict=True), key=lambda pair: -pair[1])[:k])
            for row in self._tell(prompts)
        ]

    def _tell(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        return self._classes.tell([Label(text=prompt, label="") for prompt in prompts])
