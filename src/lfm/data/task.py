"""A task says what records mean: how they become a batch, what is lost on it, and how an answer is read from logits.

A method is written once for all of them: `task = task_for(records, codec, facts)`, then `task.collate(records)` →
`forward(module, batch)` → `task.loss(logits, batch)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from lfm.core.errors import DataError
from lfm.core.interfaces import Batch, Codec
from lfm.core.model import Facts
from lfm.data.files import told_by, where
from lfm.data.records import Audio, Chat, Image, Label, Pair, Record, Text, kind_of

if TYPE_CHECKING:
    from torch import Tensor

LANGUAGE = ("causal-lm", "masked-lm", "seq2seq-lm")
"""The values of Facts.task that have a language-modelling head."""


@final
@dataclass(frozen=True)
class Task:
    """collate: records → the forward's tensors, plus "labels" ((B,) classes or (B, T) tokens, −100 where not scored).

    loss: (logits, batch) → mean CE over scored positions, fp32 scalar. predict: (logits, batch) → one answer a record.
    scored: (logits, batch) → the (N, V) logits and (N,) labels that the loss is over (a distiller compares these).
    truth: records → the right answers. metric: the headline metric's name (accuracy, perplexity, exact_match).

    What does not fit the model's context is cut by collate: the end of a text, the beginning of a prompt, never an
    answer. `fit` splits long texts first, so that nothing of them is lost. predict reads words under teacher forcing:
    each token given the right ones before it, which flatters long answers (lfm.evals also generates them).
    """

    name: str
    metric: str
    collate: Callable[[Sequence[Record]], Batch]
    loss: Callable[[Tensor, Batch], Tensor]
    scored: Callable[[Tensor, Batch], tuple[Tensor, Tensor]]
    predict: Callable[[Tensor, Batch], list[str]]
    truth: Callable[[Sequence[Record]], list[str]]


def task_for(records: Sequence[Record], codec: Codec, facts: Facts) -> Task:
    """The task that these records set a model of these facts. DataError where it cannot take it.

    text → language modelling (causal, masked, seq2seq); completion, fact → the continuation (or the blank of a masked
    model); chat → the assistant's turns; label, pair, image, audio → the head's classes, or for a model with no head
    the class's name as what follows.
    """
    from lfm.data import heads, language

    suits(records, facts)
    kind = one_kind(records)
    if kind is Image:
        return heads.images(codec, facts)
    if kind is Audio:
        return heads.sounds(codec, facts)
    if facts.task == "text-classification":
        return heads.texts(codec, facts)
    if kind is Text:
        return language.running_text(codec, facts)
    if kind is Chat:
        return language.conversations(codec, facts)
    if kind in (Label, Pair):
        return language.named_classes(records, codec, facts)
    return language.answers(codec, facts)


READS: Mapping[str, tuple[str, ...]] = {
    "image-classification": ("image",),
    "audio-classification": ("audio",),
    "text-classification": ("label", "pair"),
    **dict.fromkeys(LANGUAGE, ("text", "completion", "label", "pair", "fact", "edit")),
    "causal-lm": ("text", "completion", "chat", "label", "pair", "fact", "edit"),
}
"""The kinds of records that set a model of each task a task."""


def suits(records: Sequence[Record], facts: Facts) -> None:
    """Whether these records set a model of these facts a task, found out without opening it: DataError."""
    kind = one_kind(records).__struct_config__.tag
    reads = READS.get(facts.task, () if facts.task else ("image",))  # a bare module tells no task
    if kind not in reads:
        others = [task for task, kinds in READS.items() if kind in kinds]
        raise DataError(
            f"{kind} records set no task for a model whose task is {facts.task or 'unknown'}",
            why="it has no language-modelling or classification head" if facts.task == "encoder" else "",
            fix=(f"records of kind {' or '.join(reads)}, or " if reads else "") + f"a model for {', '.join(others)}",
        )


def fit(records: Sequence[Record], codec: Codec, facts: Facts) -> Sequence[Record]:
    """The records with each text longer than the model's context split, at token boundaries, into texts that fit.

    Other kinds are returned as they are: collate cuts the beginning of their prompts.
    """
    from lfm.data import language

    parts = [language.split(record, codec, facts) for record in records]
    places = [place for place, some in enumerate(parts) for _ in some]
    return told_by(records, [part for some in parts for part in some], places)


def one_kind(records: Sequence[Record]) -> type[Record]:
    """The kind that all the records share. DataError if there is none."""
    if not records:
        raise DataError("no records", fix="give at least one")
    first = type(records[0])
    for place, record in enumerate(records):
        if type(record) is not first:
            raise DataError(
                f"records of several kinds at once: {where(records, place)} among {kind_of(records[0])} records",
                fix="give each kind its own file",
            )
    return first
