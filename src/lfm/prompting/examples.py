"""Demonstrations: labelled records in words that stand before the one that is asked about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast, final

import msgspec

from lfm.core.errors import DataError
from lfm.core.heavy import np
from lfm.core.interfaces import Codec
from lfm.core.model import Model
from lfm.data.alike import by_words
from lfm.data.records import Label, Pair
from lfm.data.wording import spaced
from lfm.prompting.classifier import Prompt, Read, read, spoken
from lfm.prompting.reading import Reader
from lfm.prompting.template import filled

if TYPE_CHECKING:
    from numpy.typing import NDArray

END = "\n"
"""What stands between one demonstration and the next."""

MARGIN = 8
"""Tokens left for an answer and for what a tokenizer puts around a text."""


@final
class Near(msgspec.Struct, frozen=True, kw_only=True):
    """A pool of labelled records, of which the k nearest to a record by words stand before it, the nearest last."""

    labels: tuple[str, ...]
    prompt: Prompt
    pool: tuple[Label | Pair, ...]
    k: int


def demonstrations(records: Sequence[Label | Pair], prompt: Prompt, labels: Sequence[str]) -> str:
    """The records as the prompt's template words them, each with the first word of its label."""
    names = {label: words[0] for label, words in zip(labels, prompt.words, strict=True)}
    said = []
    for record in records:
        asked = filled(prompt.template, record)
        said.append(asked.prompt + spaced(asked.prompt, names[record.label]) + asked.suffix + END)
    return "".join(said)


def words_of(record: Label | Pair) -> str:
    """The text by which records are compared."""
    return f"{record.text} {record.text_b}" if isinstance(record, Pair) else record.text


def selector(near: Near) -> Callable[[Label | Pair], list[Label | Pair]]:
    """A record → the k of the pool that are nearest to it, the nearest last. Of equally near ones the first."""
    alike = by_words([words_of(record) for record in near.pool])

    def chosen(record: Label | Pair) -> list[Label | Pair]:
        scores = alike(words_of(record))
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        return [near.pool[i] for i in reversed(order[: near.k])]

    return chosen


def ask_ahead(reader: Reader, prompts: Sequence[Prompt], records: Sequence[Sequence[Label | Pair]]) -> None:
    """Put what the prompts will ask of their records at once, so that reading each asks nothing. Words are the same."""
    asked = [
        filled(prompt.template, record, before=prompt.before)
        for prompt, some in zip(prompts, records, strict=True)
        for record in some
    ]
    if asked:
        reader.words(asked, [word for group in prompts[0].words for word in group])


def fits(model: Model, texts: Sequence[str]) -> list[bool]:
    """Whether each text and an answer fit the model's context. Where length cannot be counted, all do."""
    context = model.facts.context
    if not context or not model.can(Codec) or not texts:
        return [True] * len(texts)
    return [len(ids) + MARGIN <= context for ids in model.ask(Codec).tokenizer(list(texts))["input_ids"]]


def refuse_unfit(model: Model, prompts: Sequence[Prompt], records: Sequence[Label | Pair]) -> list[Prompt]:
    """The prompts that leave room for the longest of the records. DataError if none does."""
    longest = max(records, key=lambda record: len(words_of(record)))
    asked = [filled(prompt.template, longest, before=prompt.before) for prompt in prompts]
    kept = [p for p, fit in zip(prompts, fits(model, [one.prompt + one.suffix for one in asked]), strict=True) if fit]
    if not kept:
        raise DataError(
            "no choice of examples leaves room for the text that is asked about",
            why=f"the model reads {model.facts.context} tokens at most",
            fix="take fewer examples: k=1, or shorter ones",
        )
    return kept


def tell_near(reader: Reader, near: Near, records: Sequence[Label | Pair]) -> Read:
    """What the model tells of each record after the examples nearest to it; of those, as many as its context holds."""
    chosen = selector(near)
    prompts = [_after(reader.model, near, chosen(record), record) for record in records]
    ask_ahead(reader, prompts, [[record] for record in records])
    each = [read(reader, prompt, [record]) for prompt, record in zip(prompts, records, strict=True)]
    return Read(np.concatenate([one.logp for one in each]), np.concatenate([one.doubtful for one in each]))


def _after(model: Model, near: Near, chosen: Sequence[Label | Pair], record: Label | Pair) -> Prompt:
    before = near.prompt.before
    for start in range(len(chosen)):  # the farthest goes first
        longer = near.prompt.before + demonstrations(chosen[start:], near.prompt, near.labels)
        asked = filled(near.prompt.template, record, before=longer)
        if fits(model, [asked.prompt + asked.suffix])[0]:
            before = longer
            break
    return msgspec.structs.replace(near.prompt, before=before)


def interfaces_near(model: Model, near: Near) -> Mapping[type, Callable[[], Any]]:
    """What a model gives that is shown the nearest examples: as prompting.interfaces does."""
    return spoken(NearClasses(model, near))


@final
class NearClasses:
    """Classes by the nearest examples."""

    def __init__(self, model: Model, near: Near) -> None:
        self._model, self._near = model, near

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self._model)

    @property
    def labels(self) -> tuple[str, ...]:
        return self._near.labels

    def tell(self, records: Sequence[Any]) -> NDArray[np.float64]:
        return tell_near(self._reader, self._near, cast("Sequence[Label | Pair]", records)).logp
