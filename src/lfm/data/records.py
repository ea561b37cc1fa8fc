"""What data is made of. Every record kind is one line of JSON: {"kind": "fact", …}; the kind may be left out of a
file in which one kind fits every line.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class Record(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", omit_defaults=True
):
    """One example. group: the task, domain or episode it belongs to, where that matters."""

    group: str = ""


class Text(Record, tag="text", frozen=True):
    """Running text."""

    text: str


ASSISTANT = "assistant"
"""The role of the messages that a model is to say."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one side says. weight, of an assistant's: 1: it is scored, 0: it is only read."""

    role: str
    content: str
    weight: Literal[0, 1] = 1


class Chat(Record, tag="chat", frozen=True):
    """A conversation: what its assistant says is to be learned."""

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        said = [m for m in self.messages if m.role == ASSISTANT and m.weight]
        if not said:
            raise ValueError("`messages` holds no turn of the assistant to learn")
        if not all(m.content.strip() for m in said):
            raise ValueError("`messages` holds a turn of the assistant that says nothing")


class Completion(Record, tag="completion", frozen=True):
    """A prompt and what should follow it (leading space included where the model needs one).

    ends: whether it ends there; false of what was cut: that it goes on is not learned, and neither that it ends.
    """

    prompt: str
    completion: str
    ends: bool = True


class Label(Record, tag="label", frozen=True):
    """Text and its class, by name."""

    text: str
    label: str


class Pair(Record, tag="pair", frozen=True):
    """Two texts and the class of their relation."""

    text: str
    text_b: str
    label: str


class Image(Record, tag="image", frozen=True):
    """An image and its class: a file's path, PNG/JPEG bytes, or (in memory) a uint8 array (H, W) or (H, W, 3)."""

    image: Any
    label: str


class Audio(Record, tag="audio", frozen=True):
    """A sound and its class: a file's path, its bytes, or (in memory) samples and how many are a second."""

    audio: Any
    label: str


class Fact(Record, tag="fact", frozen=True):
    """subject –relation→ object. prompt ends where the object begins; suffix is what follows it in that sentence.

    paraphrases: other prompts for the same object. neighbours: prompts (with the object each has now) that an edit of
    this fact must leave as they are.
    """

    subject: str
    relation: str
    object: str
    prompt: str
    suffix: str = "."
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[tuple[str, str], ...] = ()


class Edit(Record, tag="edit", frozen=True):
    """A fact to change: from `object` (what the model says now) to `new_object`.

    portability: prompts with the answer that follows once the fact is the new one, of which no edit is made.
    """

    subject: str
    relation: str
    object: str
    new_object: str
    prompt: str
    suffix: str = "."
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[tuple[str, str], ...] = ()
    portability: tuple[tuple[str, str], ...] = ()


KINDS: dict[str, type[Record]] = {
    k.__struct_config__.tag: k for k in (Text, Completion, Chat, Label, Pair, Image, Audio, Fact, Edit)
}  # type: ignore[misc]


def kind_of(record: Record) -> str:
    """The record's kind, as files name it."""
    return str(record.__struct_config__.tag)
