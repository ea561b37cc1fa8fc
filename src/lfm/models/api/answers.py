"""What endpoints may answer, checked: a wrong type, a wrong count or an impossible number is one EndpointError."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from lfm.core.errors import EndpointError
from lfm.core.interfaces import Ranked, Score
from lfm.models.api.client import Closed, said_by

S = TypeVar("S")

SLACK = 1e-3
"""How far above 0 rounding may lift a log-probability; anything higher is no probability."""


class Logprobs(msgspec.Struct, frozen=True):
    """Completions' logprobs, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] | None = None


class Choice(msgspec.Struct, frozen=True):
    """One completion."""

    text: str
    index: int = 0
    logprobs: Logprobs | None = None
    finish_reason: Any = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens that a request took."""

    prompt_tokens: int = 0
    completion_tokens: int | None = None
    total_tokens: int = 0


class Completion(msgspec.Struct, frozen=True):
    """The answer of /completions."""

    choices: list[Choice]


class Message(msgspec.Struct, frozen=True):
    """What an assistant says."""

    content: str | None = None


class Alternative(msgspec.Struct, frozen=True):
    """A token that might have been said, and its natural-log probability."""

    token: str
    logprob: float | None = None


class ChatToken(msgspec.Struct, frozen=True):
    """What might have been said in one token's place."""

    top_logprobs: list[Alternative] = []


class ChatLogprobs(msgspec.Struct, frozen=True):
    """A reply's logprobs, one entry a token."""

    content: list[ChatToken] | None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One reply."""

    message: Message
    index: int = 0
    logprobs: ChatLogprobs | None = None
    finish_reason: Any = None


class Chat(msgspec.Struct, frozen=True):
    """The answer of /chat/completions."""

    choices: list[ChatChoice]


class Scored(msgspec.Struct, frozen=True):
    """One continuation's tokens, from /score."""

    tokens: list[str]
    logprobs: list[float]
    index: int = 0


class Scores(msgspec.Struct, frozen=True):
    """The answer of /score."""

    data: list[Scored]


class Embedded(msgspec.Struct, frozen=True):
    """One text's input embeddings, base64 of safetensors."""

    embedding: str
    index: int = 0


class Embedding(msgspec.Struct, frozen=True):
    """The answer of /input_embeddings."""

    data: list[Embedded]


class Vector(msgspec.Struct, frozen=True):
    """One text as a vector."""

    embedding: list[float]
    index: int = 0


class Vectors(msgspec.Struct, frozen=True):
    """The answer of /embeddings."""

    data: list[Vector]


class _Used(msgspec.Struct, frozen=True):
    usage: Usage | None = None


def used(content: bytes) -> int | None:
    """Tokens that an answer says it took; None where it does not say."""
    try:
        usage = msgspec.json.decode(content, type=_Used).usage
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if usage is None:
        return None
    counts = (usage.prompt_tokens, usage.completion_tokens or 0, usage.total_tokens)
    return max(usage.total_tokens, counts[0] + counts[1]) if min(counts) >= 0 and max(counts) > 0 else None


def read(content: bytes, kind: type[S], url: str) -> S:
    """The answer as a typed value."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if content.lstrip()[:1] == b"<":
            raise Closed(
                f"{url} answered with a web page",
                why=said_by(content),
                fix="is that the API's address? Most end in /v1",
            ) from None
        raise EndpointError(f"{url} answered what the protocol does not allow", why=str(error)) from None


def in_order(items: Sequence[Any], count: int, url: str) -> list[Any]:
    """The items by index, one for each of `count` questions."""
    if sorted(item.index for item in items) != list(range(count)):
        raise EndpointError(
            f"{url} gave {len(items)} answers numbered {[item.index for item in items][:8]} to {count} questions"
        )
    return sorted(items, key=lambda item: item.index)


def probability(value: float | None, url: str) -> float:
    """A natural-log probability, or EndpointError."""
    if value is None or not math.isfinite(value) or value > SLACK:
        raise EndpointError(f"{url} gave {value} as the logarithm of a probability")
    return min(value, 0.0)


def best(choice: Choice, k: int, url: str, also: Sequence[str] = ()) -> Ranked:
    """The k most probable first tokens of a completion, and these tokens wherever they rank."""
    tops = choice.logprobs.top_logprobs if choice.logprobs is not None else None
    ranked = _ranked(list((tops[0] or {}).items()) if tops else [], url)
    _among(choice.text, ranked, url)
    return tuple(pair for place, pair in enumerate(ranked) if place < k or pair[0] in also)


def best_said(choice: ChatChoice, k: int, url: str) -> Ranked:
    """The k most probable first tokens of a reply."""
    said = (choice.logprobs.content if choice.logprobs is not None else None) or [ChatToken()]
    ranked = _ranked([(one.token, one.logprob) for one in said[0].top_logprobs], url)
    _among(choice.message.content or "", ranked, url)
    return tuple(ranked[:k])


def _among(said: str, ranked: Sequence[tuple[str, float]], url: str) -> None:
    """EndpointError where the token that was said, the likeliest, is none of those told: they are another text's.

    Only of plain words: parts of characters and special tokens are spelt in many ways.
    """
    word = said.strip()
    if word.isalnum() and not any(word in token or (token.strip() and token.strip() in word) for token, _ in ranked):
        told = ", ".join(repr(token) for token, _ in ranked[:3])
        raise EndpointError(f"{url} said {word!r} and told the log-probabilities of other tokens: {told}, …")


def _ranked(told: Sequence[tuple[str, float | None]], url: str) -> list[tuple[str, float]]:
    """Tokens and their log-probabilities, best first; EndpointError for none, or for what is no distribution."""
    if not told:
        raise EndpointError(f"{url} gave no top log-probabilities", why="it said when it was probed that it does")
    ranked = sorted(((token, probability(p, url)) for token, p in told), key=lambda pair: -pair[1])
    if sum(math.exp(p) for _, p in ranked) > 1.05:  # sixteen-bit servers round
        raise EndpointError(f"{url} gave probabilities that add up to more than 1")
    return ranked


def echoed(choice: Choice, prompt: str, continuation: str, url: str) -> Score:
    """The continuation's part of an echoed text. A token across the boundary belongs to the continuation."""
    whole, found = prompt + continuation, choice.logprobs
    if found is None or found.text_offset is None:
        raise EndpointError(f"{url} echoed without log-probabilities and offsets")
    tokens, values, places = found.tokens, found.token_logprobs, list(found.text_offset)
    if choice.text != whole or not tokens or not len(tokens) == len(values) == len(places):
        raise EndpointError(f"{url} did not echo the text it was given")
    if values[0] is None and len(tokens) > 1 and (places[1] == 0 or "".join(tokens[1:]) == whole):
        # The opening token is not part of the text; some servers count it in the offsets and some do not.
        places = [place - places[1] for place in places[1:]]
        tokens, values = tokens[1:], values[1:]
    if places != sorted(places) or places[0] < 0 or places[-1] > len(whole):
        raise EndpointError(f"{url} gave offsets that do not follow the text")
    ends = [next((later for later in places[i:] if later > place), len(whole)) for i, place in enumerate(places)]
    inside = [i for i, end in enumerate(ends) if end > len(prompt)]
    if inside and values[inside[0]] is None:
        raise EndpointError(
            f"{url} does not score the first token of a text", fix="score continuations of a prompt that is not empty"
        )
    return Score(tuple(tokens[i] for i in inside), tuple(probability(values[i], url) for i in inside))


def scored(answer: Scored, url: str) -> Score:
    """A score from /score."""
    if len(answer.tokens) != len(answer.logprobs):
        raise EndpointError(f"{url} scored {len(answer.logprobs)} of {len(answer.tokens)} tokens")
    return Score(tuple(answer.tokens), tuple(probability(p, url) for p in answer.logprobs))


def vector(answer: Vector, url: str, width: int = 0) -> list[float]:
    """A text's vector, of so many numbers where that is known."""
    found = answer.embedding
    if not found or not all(map(math.isfinite, found)):
        raise EndpointError(f"{url} gave a vector that holds {'no number' if not found else 'NaN or infinity'}")
    if width and len(found) != width:
        raise EndpointError(f"{url} gave a vector of {len(found)} numbers, and one of {width} before")
    return found


class Models(msgspec.Struct, frozen=True):
    """The answer of /models. Each entry has an id; ours also tells abilities."""

    data: list[dict[str, Any]]
