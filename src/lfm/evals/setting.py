"""What every family of metrics is given: the model by the access it gives, the records, and how to go about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import msgspec

from lfm.core.errors import AccessError, DataError
from lfm.core.interfaces import Batch, Classes, Codec, Logits, Logprobs, Text, name_of
from lfm.core.model import Model
from lfm.data.records import Record, kind_of
from lfm.data.task import LANGUAGE, Task, task_for
from lfm.evals.estimate import Measure

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]
"""(done, total) of the questions put to the model, whenever some are answered."""


@final
class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What the model said to one record. expected: the right answer, where there is one."""

    prompt: str
    answer: str
    expected: str = ""


@final
@dataclass(frozen=True)
class Found:
    """What a family of metrics found. notes: what a reader of the numbers must know."""

    measures: list[Measure] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@final
@dataclass(frozen=True)
class Setting:
    """access: the interface that the metrics rest on. wants: whether a metric of that name is asked for."""

    model: Model
    records: Sequence[Record]
    access: type
    task: Task | None
    batch_size: int
    samples: int
    wants: Callable[[str], bool]
    done: Callable[[int], None]

    def logits(self, task: Task, records: Sequence[Record]) -> Iterator[tuple[list[int], Tensor, Batch]]:
        """(places of records, logits, batch), records of like length together."""
        asked = self.model.ask(Logits)
        order = sorted(range(len(records)), key=lambda i: (_size(records[i]), i))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            batch = task.collate([records[i] for i in places])
            yield places, asked.logits(batch), batch
            self.done(len(places))

    def task_of(self, records: Sequence[Record]) -> Task:
        """The task that was given, or the one that these records set."""
        return self.task or task_for(records, self.model.ask(Codec), self.model.facts)

    def logprobs(self) -> Logprobs:
        """The model's own scoring of text, or scoring made from its logits."""
        if self.model.can(Logprobs) or self.model.facts.task == "seq2seq-lm":
            return self.model.ask(Logprobs)
        from lfm.models.language import CausalLogprobs, MaskedLogprobs

        logits, codec = self.model.ask(Logits).logits, self.model.ask(Codec)
        return (MaskedLogprobs if self.model.facts.task == "masked-lm" else CausalLogprobs)(logits, codec)

    def said(self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Greedy continuations."""
        asked, found = self.model.ask(Text), []
        for start in range(0, len(prompts), 32):
            found += asked.generate(prompts[start : start + 32], max_tokens=max_tokens, stop=stop)
            self.done(len(prompts[start : start + 32]))
        return found


def access_for(model: Model, records: Sequence[Record]) -> type:
    """The most telling access that the model gives and that suits these records: logits, classes, logprobs, text.

    AccessError naming what would do.
    """
    kind = kind_of(records[0])
    task = model.facts.task
    wanted: tuple[type, ...] = (Logits, Logprobs, Text)
    if kind in ("label", "pair"):
        wanted = (Logits, Classes, Logprobs, Text)
    elif kind in ("image", "audio", "chat"):
        wanted = (Logits,)
    elif kind == "text":
        wanted = (Logits, Logprobs)  # text alone tells no probabilities
    for access in wanted:
        if not model.can(access):
            continue
        if access is not Logits or (model.can(Codec) and task not in ("", "encoder", "module")):
            return access
    needed = " or ".join("logits with a codec" if w is Logits else name_of(w) for w in wanted)
    raise AccessError(
        f"{model.ref} cannot be evaluated on {kind} records",
        why=f"that needs {needed}, and {model.offers}",
        fix="" if task in LANGUAGE or not task else f"its task is {task}",
    )


def suits(model: Model, records: Sequence[Record]) -> None:
    """Whether the model can be evaluated on these records, found out without running it: AccessError or DataError."""
    access = access_for(model, records)
    if kind_of(records[0]) == "edit" and model.facts.task and model.facts.task not in LANGUAGE:
        raise DataError(f"edit records need a language model, this is {model.facts.task}")
    if access is Logits and kind_of(records[0]) != "edit":
        task_for(records, model.ask(Codec), model.facts)


def _size(record: Record) -> int:
    return sum(len(value) for name in record.__struct_fields__ if isinstance(value := getattr(record, name), str))
