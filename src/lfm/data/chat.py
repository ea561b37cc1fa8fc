"""Conversations as a model's own chat template renders them, and which characters of that its assistant says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast

import msgspec

from lfm.core.errors import DataError
from lfm.data.files import told_by
from lfm.data.records import ASSISTANT, Chat, Record

if TYPE_CHECKING:
    from lfm.data.records import Message

R = TypeVar("R", bound=Record)
Turns = Literal["all", "last"]


class Rendered(NamedTuple):
    """A conversation as text, and where the turns that are scored begin and end in it, in order."""

    text: str
    said: tuple[tuple[int, int], ...]


def scored(records: Sequence[R], turns: Turns) -> Sequence[R]:
    """The records, conversations with their last scored turn alone where `turns` is last."""
    if turns == "all" or not isinstance(next(iter(records), None), Chat):
        return records
    last = [_last(cast("Chat", record)) for record in records]
    return cast("Sequence[R]", told_by(records, last, range(len(last))))


def _last(record: Chat) -> Chat:
    last = max(i for i, message in enumerate(record.messages) if counts(message))
    kept = [m if i == last else msgspec.structs.replace(m, weight=0) for i, m in enumerate(record.messages)]
    return msgspec.structs.replace(record, messages=tuple(kept))


def counts(message: Message) -> bool:
    """Whether what it says is scored."""
    return message.role == ASSISTANT and message.weight > 0


def rendered(record: Chat, tokenizer: Any) -> Rendered:
    """The conversation up to its last scored turn, by the tokenizer's template.

    A turn begins where the template, asked for one, leaves off, and ends with the token that ends it. DataError where
    there is no template, it takes no such conversation, or it shows a turn otherwise once others follow.
    """
    places = [i for i, message in enumerate(record.messages) if counts(message)]
    messages = [{"role": message.role, "content": message.content} for message in record.messages[: places[-1] + 1]]
    whole = _told(tokenizer, messages, asks=False)
    said = []
    for place in places:
        begun = _told(tokenizer, messages[:place], asks=True)
        ended = _told(tokenizer, messages[: place + 1], asks=False)
        if not whole.startswith(begun) or not whole.startswith(ended) or len(ended) <= len(begun):
            raise DataError(
                f"the chat template shows message {place + 1} otherwise when others follow or precede it",
                why="what the assistant says there cannot be told from the rest",
                fix='only its last turn scored ("weight": 0 in the others; turns=last in tune.full)'
                if len(places) > 1
                else "prompt and completion records",
            )
        said.append((len(begun), _end(tokenizer, ended)))
    return Rendered(whole, tuple(said))


def _told(tokenizer: Any, messages: list[dict[str, str]], *, asks: bool) -> str:
    """The messages as text. asks: with what opens an assistant's turn after them."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "this model's tokenizer has no chat template, which says how a conversation is written down",
            fix="a model tuned to chat, a chat_template.jinja beside the model, or prompt and completion records",
        )
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise DataError("the model's chat template takes no such conversation", why=str(error)) from None


def _end(tokenizer: Any, text: str) -> int:
    """Where the turn that ends the text ends: with its last special token, less the white space after that."""
    trimmed = text.rstrip()
    return len(trimmed) if any(trimmed.endswith(token) for token in tokenizer.all_special_tokens) else len(text)
