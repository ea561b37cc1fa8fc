"""Tasks of models with a classification head: the classes, their order and their names are the config's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from lfm.core.errors import DataError
from lfm.core.heavy import F, torch
from lfm.core.interfaces import Batch, Codec
from lfm.core.model import Facts
from lfm.data.records import Audio, Image, Label, Pair, Record
from lfm.data.task import Task
from lfm.models.codec import pad, pad_id

if TYPE_CHECKING:
    from torch import Tensor


def texts(codec: Codec, facts: Facts) -> Task:
    """Classes of texts or of pairs of texts; longer inputs lose their end (of a pair, the longer one does)."""
    from lfm.data.language import context_of

    def collate(records: Sequence[Record]) -> Batch:
        tokenizer = codec.tokenizer
        first = [cast("Label | Pair", r).text for r in records]
        second = [r.text_b for r in records if isinstance(r, Pair)]
        limit = context_of(tokenizer, facts)
        cut: dict[str, Any] = {"truncation": "longest_first", "max_length": limit} if limit else {}
        rows = tokenizer(first, second or None, **cut)
        batch = pad(rows["input_ids"], pad_id(tokenizer))
        if second and "token_type_ids" in rows:
            batch["token_type_ids"] = pad(rows["token_type_ids"], 0)["input_ids"]
        return batch | _labels(records, facts)

    return _task("text-classification", collate, facts)


def images(codec: Codec, facts: Facts) -> Task:
    """Classes of images."""

    def collate(records: Sequence[Record]) -> Batch:
        return dict(codec.images([cast("Image", r).image for r in records])) | _labels(records, facts)

    return _task("image-classification", collate, facts)


def sounds(codec: Codec, facts: Facts) -> Task:
    """Classes of sounds."""

    def collate(records: Sequence[Record]) -> Batch:
        return dict(codec.sounds([cast("Audio", r).audio for r in records])) | _labels(records, facts)

    return _task("audio-classification", collate, facts)


def class_of(label: str, facts: Facts) -> int:
    """The label's place in the config's order. A numeral that names no class is itself the place."""
    if label in facts.labels:
        return facts.labels.index(label)
    if label.isdecimal() and (not facts.labels or int(label) < len(facts.labels)):
        return int(label)
    shown = ", ".join(facts.labels[:12]) + (", …" if len(facts.labels) > 12 else "")
    raise DataError(
        f"{label!r} is not one of the model's classes",
        why=f"they are {shown}" if shown else "the model names none",
        fix="name the classes as the model's config does (id2label), or number them from 0",
    )


def _labels(records: Sequence[Record], facts: Facts) -> dict[str, Tensor]:
    places = [class_of(cast("Label | Pair | Image | Audio", r).label, facts) for r in records]
    return {"labels": torch.tensor(places, dtype=torch.long)}


def _task(name: str, collate: Any, facts: Facts) -> Task:
    def named(place: int) -> str:
        return facts.labels[place] if place < len(facts.labels) else str(place)

    def scored(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return logits.float(), batch["labels"].to(logits.device)

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(*scored(logits, batch))

    def predict(logits: Tensor, batch: Batch) -> list[str]:
        return [named(place) for place in logits.argmax(-1).tolist()]

    def truth(records: Sequence[Record]) -> list[str]:
        return [named(class_of(cast("Label | Pair | Image | Audio", r).label, facts)) for r in records]

    return Task(name, "accuracy", collate, loss, scored, predict, truth)
