"""Text, Logprobs and Embeddings over HTTP. Every answer is kept by its question, so that asking again is free."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, final
from urllib.parse import quote

import msgspec

from lfm.core.errors import EndpointError
from lfm.core.heavy import np
from lfm.core.interfaces import Ranked, Said, Score
from lfm.models.api import answers
from lfm.models.api.cache import Cache, digest_of
from lfm.models.api.capabilities import Capabilities, bound
from lfm.models.api.client import Charge, Client, Refused

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

A = TypeVar("A")

LARGE = 2**23
"""Characters of embeddings a request; also the largest table that is kept in the cache, in bytes."""


class Question(NamedTuple):
    """One prompt of a request. many: fields whose values, one a prompt, make a list when prompts travel together."""

    many: Mapping[str, Any]
    shared: Mapping[str, Any]
    tokens: int  # the most it can take, prompt and answer
    understood: Callable[[Any], Any]  # what its answer means; EndpointError where it means nothing


@final
@dataclass(frozen=True)
class Line:
    """An open endpoint. identity: what the cache knows it by."""

    client: Client
    cache: Cache
    can: Capabilities
    model: str
    identity: str

    @property
    def url(self) -> str:
        return self.client.endpoint.url

    def charged(self) -> int:
        """The tokens that the endpoint's budget was charged so far."""
        return self.client.meter.spent().tokens

    def table(self) -> bytes:
        """The input-embedding table as a safetensors file."""
        key = digest_of([self.identity, "table"])
        raw = self.cache.get([key]).get(key)
        if raw is None:
            path = "/input_embeddings"
            raw = self._granted(path, lambda: self.client.get(f"{path}?model={quote(self.model, safe='')}", Charge(1)))
            if len(raw) <= LARGE:
                self.cache.put({key: raw})
        return raw

    def _granted(self, path: str, send: Callable[[], bytes]) -> bytes:
        try:
            return send()
        except Refused as refusal:
            raise EndpointError(
                f"{self.url}{path} refused the request ({refusal.status})",
                why=refusal.said,
                fix=f"if the server changed since it was first asked, delete {self.cache.path}",
            ) from None

    def ask(
        self, path: str, questions: Sequence[Question], parse: Callable[[bytes], Sequence[A]], kind: type[A]
    ) -> list[Any]:
        """What each question's answer means, from the cache or from the server.

        Each request's answers are kept as they come, once they were understood: a lie is not kept.
        """
        keys = [digest_of([self.identity, path, dict(q.many), dict(q.shared)]) for q in questions]
        known = self.cache.get(list(dict.fromkeys(keys)))
        missing = list({key: q for key, q in zip(keys, questions, strict=True) if key not in known}.items())
        meant: dict[str, Any] = {}

        def send(batch: list[tuple[str, Question]]) -> dict[str, Any]:
            asked = [question for _, question in batch]
            body = {"model": self.model, **asked[0].shared}
            for name in asked[0].many:
                values = [question.many[name] for question in asked]
                body[name] = values if len(values) > 1 or path == "/score" else values[0]
            charge = Charge(len(asked), sum(question.tokens for question in asked))
            content = self._granted(path, lambda: self.client.post(path, body, charge, answers.used))
            found = answers.in_order(parse(content), len(asked), self.url)
            understood = {key: q.understood(answer) for (key, q), answer in zip(batch, found, strict=True)}
            self.cache.put({key: msgspec.json.encode(answer) for (key, _), answer in zip(batch, found, strict=True)})
            return understood

        for some in self.client.map(send, self._batches(missing)):
            meant |= some
        return [
            meant[key] if key in meant else q.understood(msgspec.json.decode(known[key], type=kind))
            for key, q in zip(keys, questions, strict=True)
        ]

    def _batches(self, missing: list[tuple[str, Question]]) -> list[list[tuple[str, Question]]]:
        batches: list[list[tuple[str, Question]]] = []
        size = 0
        for key, question in missing:
            own = sum(len(value) for value in question.many.values() if isinstance(value, str))
            last = batches[-1] if batches else []
            joins = 0 < len(last) < self.can.batch and size + own <= LARGE and last[0][1].shared == question.shared
            if joins:
                last.append((key, question))
                size += own
            else:
                batches.append([(key, question)])
                size = own
        return batches

    def complete(self, questions: Sequence[Question]) -> list[Any]:
        return self.ask(
            "/completions",
            questions,
            lambda content: answers.read(content, answers.Completion, self.url).choices,
            answers.Choice,
        )

    def chat(self, said: Sequence[tuple[str, Mapping[str, Any], int, Callable[[Any], Any]]]) -> list[Any]:
        """What replies mean to messages, each with its settings, the most tokens of its reply, and how it is read."""
        questions = [
            Question(
                {},
                {**own, "messages": [{"role": "user", "content": prompt}]},
                bound(prompt) + self.can.chat_overhead + most,
                understood,
            )
            for prompt, own, most, understood in said
        ]
        return self.ask(
            "/chat/completions",
            questions,
            lambda content: answers.read(content, answers.Chat, self.url).choices,
            answers.ChatChoice,
        )


@final
class ApiText:
    """Text from completions, or from chat where the server has nothing else."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self.charged = line.charged

    def generate(self, prompts: Sequence[str], **how: Any) -> list[str]:
        return [one.text for one in self.said(prompts, **how)]

    def said(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[Said]:
        """As generate, with what the server says ended each: its finish_reason, "length" where it was cut."""
        line = self._line
        limit = "max_tokens" if line.can.completions else line.can.limit
        shared: dict[str, Any] = {limit: max_tokens, "temperature": temperature}
        if stop:
            shared["stop"] = list(stop)
        # Sampled prompts get a seed each, or equal prompts would get equal answers.
        each = [{**shared, "seed": _seed(seed, i)} if temperature > 0 else shared for i in range(len(prompts))]
        if line.can.completions:
            extra = line.can.overhead + max_tokens
            return line.complete(
                [
                    Question({"prompt": prompt}, own, bound(prompt) + extra, _text)
                    for prompt, own in zip(prompts, each, strict=True)
                ]
            )
        return line.chat([(prompt, own, max_tokens, _said) for prompt, own in zip(prompts, each, strict=True)])


def _text(choice: answers.Choice) -> Said:
    return Said(choice.text, choice.finish_reason == "length")


def _said(choice: answers.ChatChoice) -> Said:
    return Said(choice.message.content or "", choice.finish_reason == "length")


@final
class ApiLogprobs:
    """Scores by /score where the server is ours, by echo elsewhere; next tokens by the logprobs of one token."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self.charged = line.charged

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        line, pairs = self._line, list(zip(prompts, continuations, strict=True))
        endings = list(suffixes) or [""] * len(pairs)
        if line.can.score:
            asked = [
                Question(
                    {"prompts": p, "continuations": c, "suffixes": s},
                    {},
                    bound(p + c + s) + line.can.overhead,
                    partial(answers.scored, url=line.url),
                )
                for (p, c), s in zip(pairs, endings, strict=True)
            ]
            return line.ask(
                "/score", asked, lambda content: answers.read(content, answers.Scores, line.url).data, answers.Scored
            )
        shared = {"max_tokens": 0, "temperature": 0, "echo": True, "logprobs": 1}
        return line.complete(
            [
                # Some servers make one token all the same, so it is reserved.
                Question(
                    {"prompt": p + c},
                    shared,
                    bound(p + c) + line.can.overhead + 1,
                    partial(answers.echoed, prompt=p, continuation=c, url=line.url),
                )
                for p, c in pairs
            ]
        )

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Ranked]:
        line, most = self._line, min(k, self._line.can.top_k)
        shared = {"max_tokens": 1, "temperature": 0, "logprobs": most}
        endings = list(suffixes) or [""] * len(prompts)
        asked = [
            Question(
                {"prompt": prompt},
                {**shared, "suffix": suffix} if line.can.suffix and suffix else shared,
                bound(prompt + suffix) + line.can.overhead + 1,
                partial(answers.best, k=most, url=line.url),
            )
            for prompt, suffix in zip(prompts, endings, strict=True)
        ]
        return line.complete(asked)


@final
class ApiVectors:
    """Texts as vectors, by /embeddings."""

    def __init__(self, line: Line) -> None:
        self._line, self._width = line, 0
        self.charged = line.charged

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        line = self._line

        def understood(answer: answers.Vector) -> list[float]:
            found = answers.vector(answer, line.url, self._width)
            self._width = len(found)
            return found

        shared = {"encoding_format": "float"}
        rows = line.ask(
            "/embeddings",
            [Question({"input": text}, shared, bound(text) + line.can.overhead, understood) for text in texts],
            lambda content: answers.read(content, answers.Vectors, line.url).data,
            answers.Vector,
        )
        return np.array(rows, dtype=np.float32).reshape(len(texts), self._width)


@final
class ApiChatTop:
    """The likeliest first tokens of a reply, by a chat that tells them. Suffixes are ignored."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self.charged = line.charged

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Ranked]:
        line, most = self._line, min(k, self._line.can.chat_top_k)
        shared: dict[str, Any] = {line.can.limit: 1, "temperature": 0, "logprobs": True, "top_logprobs": most}
        understood = partial(answers.best_said, k=most, url=line.url)
        return line.chat([(prompt, shared, 1, understood) for prompt in prompts])


@final
class ApiEmbeddings:
    """Input embeddings to and from a server that gives its table: the access of a black-box prompt tuner."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self.charged = line.charged
        self._table: Tensor | None = None

    def table(self) -> Tensor:
        from lfm.models.api.embeds import from_safetensors

        if self._table is None:
            self._table = from_safetensors(self._line.table())
        return self._table

    def embed(self, texts: Sequence[str], suffixes: Sequence[str] = ()) -> list[Tensor]:
        from lfm.models.api.embeds import decode

        if any(suffixes):
            raise EndpointError(
                f"{self._line.url} does not take what follows an answer as embeddings",
                fix="end the template with the answer, or give the model as a directory",
            )
        # Looking a text up in the table is a query, but the model reads no token.
        return self._line.ask(
            "/input_embeddings",
            [Question({"input": text}, {}, 0, lambda one: decode(one.embedding)) for text in texts],
            lambda content: answers.read(content, answers.Embedding, self._line.url).data,
            answers.Embedded,
        )

    def next_from(self, embeds: Sequence[Tensor], k: int, also: Sequence[str] = ()) -> list[Ranked]:
        from lfm.models.api.embeds import encode

        line, most = self._line, min(k, self._line.can.top_k)
        shared: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "logprobs": most}
        if also:
            shared["logprob_tokens"] = list(also)
        read = partial(answers.best, k=most, url=line.url, also=also)
        return line.complete([Question({"prompt_embeds": encode(one)}, shared, len(one) + 1, read) for one in embeds])


def _seed(seed: int, place: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{place}".encode()).digest()[:4]) >> 1
