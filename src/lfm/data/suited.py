"""Whether records will do for what is to be made of them, found out before any weight is read: DataError by file and
line where not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lfm.core.errors import DataError
from lfm.core.interfaces import Codec, Gradients
from lfm.core.method import Data
from lfm.core.model import Facts
from lfm.data import heads
from lfm.data import task as tasks
from lfm.data.chat import rendered
from lfm.data.files import where
from lfm.data.records import Audio, Chat, Record, Text, kind_of
from lfm.data.wording import wording
from lfm.models.codec import SoundCodec

if TYPE_CHECKING:
    from lfm.core.method import Inputs, Method
    from lfm.core.model import Model
    from lfm.data.task import Task

WORDS = {
    "text": ("text",),
    "label": ("text",),
    "pair": ("text", "text_b"),
    "completion": ("completion",),
    "fact": ("prompt", "object"),
}
"""Of a kind of records, the fields that must not be blank; an empty prompt is one."""

CLASSED = "name its class, or leave the record out"
"""What mends a record without a class."""

SPECIAL = 8
"""Tokens that a model may put around an answer, at most."""


def declared(method: Method[Any], inputs: Inputs) -> None:
    """Of every data role that asks for more than unlabelled records: that each has words, and says its class."""
    for role, records in inputs.data.items():
        if method.data[role].level >= Data.FEW_SHOT:
            worded(records)
            classed(records)


def suited(config: Any, inputs: Inputs, *, role: str = "", learns: str = CLASSED) -> None:
    """A method's `agree`: whether its records set the model that it trains a task, before any weight is read.

    role: that model's; the first that gives gradients where none is named. learns: what mends a record without a class;
    empty where classes are not learned, and need not be said. DataError naming the record that is blank or of no class,
    whose class is none of a classifier's, that a chat template does not take, whose answer is longer than the context,
    whose sound is too short, or that is of another kind than the rest.
    """
    given = [inputs.model(role)] if role else [m for some in inputs.models.values() for m in some if m.can(Gradients)]
    kinds: dict[str, str] = {}
    for name, records in inputs.data.items():
        worded(records)
        if learns:
            classed(records, learns)
        if len(records) and given:
            tasks.suits(records, given[0].facts)
            fitting(records, given[0])
            kinds[name] = kind_of(records[0])
    if "dev" in kinds and kinds["dev"] != kinds.get("train", kinds["dev"]):
        raise DataError(
            f"{where(inputs.records('dev'), 0)}: a {kinds['dev']} record, and train holds {kinds['train']} records",
            why="what is held out is told by the task that is learned",
            fix="give both of one kind",
        )


def worded(records: Sequence[Record]) -> None:
    """DataError naming the record that has nothing to read, or nothing to say, where its kind asks for words."""
    asked = WORDS.get(kind_of(records[0]), ()) if len(records) else ()
    for place, record in enumerate(records):
        for field in asked:
            if not getattr(record, field).strip():
                raise DataError(
                    f"{where(records, place)}: {field!r} is blank",
                    why="a model learns nothing from it",
                    fix="give it words, or leave the record out",
                )


def classed(records: Sequence[Record], fix: str = CLASSED) -> None:
    """DataError naming the record that says no class, where its kind has one."""
    if not len(records) or not hasattr(records[0], "label"):
        return
    for place, record in enumerate(records):
        if not getattr(record, "label", "none asked").strip():
            raise DataError(f"{where(records, place)}: 'label' is blank", why="there is no class to learn", fix=fix)


def fitting(records: Sequence[Record], model: Model, facts: Facts | None = None) -> None:
    """DataError naming the record that a model of these facts (its own, unless others are given) cannot take."""
    facts = facts or model.facts
    known: set[str] = set()
    headed = facts.task.endswith("-classification") and bool(facts.labels)
    task: Task | None = None
    for place, record in enumerate(records):
        try:
            label = str(getattr(record, "label", ""))
            if headed and label and label not in known:
                heads.class_of(label, facts)
                known.add(label)
            if isinstance(record, Audio) and isinstance(codec := model.ask(Codec), SoundCodec):
                codec.learnable(record.audio)
            if _may_not_fit(record, model, facts):
                task = task or tasks.task_for(records, model.ask(Codec), facts)
                task.collate([record])
        except DataError as error:
            raise DataError(f"{where(records, place)}: {error.what}", why=error.why, fix=error.fix) from None


def _may_not_fit(record: Record, model: Model, facts: Facts) -> bool:
    """Whether a language model's answer has more bytes than its context tokens, so that it is worth tokenising."""
    if facts.task not in tasks.LANGUAGE or isinstance(record, Text):
        return False
    if isinstance(record, Chat):
        text, said = rendered(record, model.ask(Codec).tokenizer)
        answer = text[said[-1][0] :] if said else ""
    else:
        asked = wording(record)
        answer = asked.answer + asked.suffix
    return 0 < facts.context < len(answer.encode()) + SPECIAL
