"""The server: OpenAI's protocol over the interfaces of models, each under a name."""

from __future__ import annotations

import base64
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, final
from urllib.parse import parse_qs

import msgspec

from lfm.core import interfaces
from lfm.core.errors import AccessError, LfmError
from lfm.core.interfaces import Codec, Embeddings, Logits, Logprobs, Vectors, names_of
from lfm.core.model import Model
from lfm.models.api.capabilities import EXTENSION, MARGIN, Capabilities, Told, bound
from lfm.serve import wire
from lfm.serve.complete import Asked, Made, complete, count, finite
from lfm.serve.wire import Bad

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

LARGEST = 2**26
"""Bytes of a request, unless the server is told otherwise."""

COMPLETION_TOKENS = 16
"""max_tokens of a completion that names none, as in OpenAI's protocol."""

CHAT_TOKENS = 256
"""max_tokens of a chat reply that names none."""

SERVED = (interfaces.Text, Logprobs, Embeddings, Vectors)


def application(models: Mapping[str, Model], *, largest: int = LARGEST, together: bool = False) -> Starlette:
    """The application that serves models by name, the first where a request names none.

    largest: bytes of a request. Requests wait for one another, unless `together`: where the models themselves answer
    several at once. AccessError if one gives nothing that the protocol carries.
    """
    from anyio import Lock, to_thread
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.responses import Response as Plain
    from starlette.routing import Route

    for model in models.values():
        if not any(kind in model.gives for kind in SERVED):
            has, wanted = ", ".join(names_of(model.gives)) or "nothing", ", ".join(names_of(SERVED))
            raise AccessError(f"{model.ref} cannot be served", why=f"it gives {has}; clients ask for {wanted}")
    servers = {name: Server(model, name) for name, model in models.items()}
    lock = nullcontext() if together else Lock()

    def named(name: str) -> Server:
        if name and name not in servers:
            known = ", ".join(map(repr, servers))
            raise Bad(f"there is no model {name!r}; this server has {known}", status=404, code="model_not_found")
        return servers[name] if name else next(iter(servers.values()))

    async def ask(fn: Callable[[], Any]) -> Any:
        try:
            async with lock:
                return await to_thread.run_sync(fn)
        except (Bad, LfmError):
            raise
        except Exception as error:
            # Told to the server's log and not to the client; raised on, it would break the connection.
            logging.getLogger(__name__).exception("a request failed")
            raise wire.as_bad(error) from None

    def endpoint(answer: Callable[[Server, bytes], Any]) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Response:
            body = await _body(request, largest)
            made = await ask(lambda: answer(named(wire.model_of(body)), body))
            if isinstance(made, Events):
                return StreamingResponse(_events(made), media_type="text/event-stream")
            return JSONResponse(made)

        return handle

    async def listed(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [await ask(server.entry) for server in servers.values()]})

    async def one_model(request: Request) -> Response:
        return JSONResponse(await ask(named(request.path_params["model"]).entry))

    async def table(request: Request) -> Response:
        server = named(next(iter(parse_qs(request.url.query).get("model", [])), ""))
        return Plain(await ask(server.table), media_type="application/octet-stream")

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = Bad(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
        bad = wire.as_bad(error)
        return JSONResponse(wire.error_body(bad), status_code=bad.status)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", listed),
            Route("/v1/models/{model:path}", one_model),
            Route("/v1/completions", endpoint(Server.completions), methods=["POST"]),
            Route("/v1/chat/completions", endpoint(Server.chat), methods=["POST"]),
            Route("/v1/score", endpoint(Server.score), methods=["POST"]),
            Route("/v1/embeddings", endpoint(Server.vectors), methods=["POST"]),
            Route("/v1/input_embeddings", table, methods=["GET"]),
            Route("/v1/input_embeddings", endpoint(Server.input_embeddings), methods=["POST"]),
        ],
        exception_handlers=dict.fromkeys((Bad, LfmError, HTTPException), failed),
    )


@final
class Events:
    """An answer to be sent as server-sent events."""

    def __init__(self, events: Iterator[dict[str, Any]]) -> None:
        self.events = events


async def _events(made: Events) -> AsyncIterator[bytes]:
    for event in made.events:
        yield b"data: " + msgspec.json.encode(event) + b"\n\n"
    yield b"data: [DONE]\n\n"


async def _body(request: Request, largest: int) -> bytes:
    content = bytearray()
    too_much = Bad(f"the request is larger than {largest} bytes", status=413)
    with suppress(ValueError):
        if int(request.headers.get("content-length", "0")) > largest:
            raise too_much
    async for piece in request.stream():
        content += piece
        if len(content) > largest:
            raise too_much
    return bytes(content)


@final
class Server:
    """The protocol's operations on one model, as functions from a request's bytes to JSON values."""

    def __init__(self, model: Model, name: str) -> None:
        self._model, self._name, self._born = model, name, int(time.time())

    def entry(self) -> dict[str, Any]:
        """OpenAI's description of the model, with its abilities, facts and digest."""
        told = Told(digest=self._model.digest, can=abilities(self._model), facts=self._model.facts._asdict())
        entry = {"id": self._name, "object": "model", "created": self._born, "owned_by": "lfm"}
        return {**entry, EXTENSION: msgspec.to_builtins(told)}

    def completions(self, body: bytes) -> Any:
        request: wire.Completions = wire.parse(body, wire.Completions)
        embeddings = Embeddings in self._model.gives
        width = self._model.ask(Embeddings).table().shape[1] if embeddings and request.prompt_embeds else None
        prompts = wire.prompts_of(request, width)
        asked = _asked(
            request,
            COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens,
            logprobs=request.logprobs,
            echo=bool(request.echo),
            suffix=request.suffix or "",
            also=tuple(request.logprob_tokens),
        )
        made = complete(self._model, prompts, asked)
        flat = [one for row in made for one in row]
        usage = self._usage(prompts, flat)
        shape = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", **self._stamp()}
        if request.stream:
            return Events(_text_events(shape, flat, usage if request.wants_usage else None))
        choices = [
            {"index": i, "text": one.text, "logprobs": _logprobs(one, asked), "finish_reason": one.finish}
            for i, one in enumerate(flat)
        ]
        return {**shape, "choices": choices, **({"usage": usage} if usage else {})}

    def chat(self, body: bytes) -> Any:
        request: wire.ChatCompletions = wire.parse(body, wire.ChatCompletions)
        if request.top_logprobs and not request.logprobs:
            raise Bad("top_logprobs needs logprobs: true", param="top_logprobs")
        wanted = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
        prompt = wire.Text(rendered(self._model, request.messages))
        asked = _asked(
            request,
            CHAT_TOKENS if wanted is None else max(wanted, 1),
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )
        made = complete(self._model, [prompt], asked)[0]
        usage = self._usage([prompt], made)
        shape = {"id": f"chatcmpl-{uuid.uuid4().hex}", **self._stamp()}
        if request.stream:
            shape["object"] = "chat.completion.chunk"
            return Events(_chat_events(shape, made, usage if request.wants_usage else None))
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": one.text},
                "logprobs": {"content": [_chat_token(t) for t in one.tokens]} if asked.logprobs is not None else None,
                "finish_reason": one.finish,
            }
            for i, one in enumerate(made)
        ]
        return {**shape, "object": "chat.completion", "choices": choices, **({"usage": usage} if usage else {})}

    def score(self, body: bytes) -> Any:
        request: wire.Scores = wire.parse(body, wire.Scores)
        lengths = {len(request.prompts), len(request.continuations), len(request.suffixes or request.prompts)}
        if len(lengths) > 1:
            raise Bad("prompts, continuations and suffixes differ in number", param="continuations")
        suffixes = request.suffixes if any(request.suffixes) else ()
        scores = self._model.ask(Logprobs).score(request.prompts, request.continuations, suffixes)
        data = [
            {"index": i, "tokens": list(score.tokens), "logprobs": [finite(p) for p in score.logprobs]}
            for i, score in enumerate(scores)
        ]
        whole = [
            wire.Text(p + c + s)
            for p, c, s in zip(
                request.prompts, request.continuations, request.suffixes or [""] * len(request.prompts), strict=True
            )
        ]
        usage = self._usage(whole, [])
        return {"object": "list", "data": data, **({"usage": usage} if usage else {})}

    def vectors(self, body: bytes) -> Any:
        request: wire.Vectors = wire.parse(body, wire.Vectors)
        texts = [request.input] if isinstance(request.input, str) else request.input
        if not all(texts):
            raise Bad("a text is empty", param="input")
        rows = self._model.ask(Vectors).vectors(texts)
        plain = request.encoding_format == "float"
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": row.tolist() if plain else base64.b64encode(row.astype("<f4").tobytes()).decode("ascii"),
            }
            for i, row in enumerate(rows)
        ]
        usage = self._usage([wire.Text(text) for text in texts], [])
        return {"object": "list", "data": data, "model": self._name, **({"usage": usage} if usage else {})}

    def input_embeddings(self, body: bytes) -> Any:
        from lfm.models.api.embeds import encode

        request: wire.InputEmbeddings = wire.parse(body, wire.InputEmbeddings)
        texts = [request.input] if isinstance(request.input, str) else request.input
        rows = self._model.ask(Embeddings).embed(texts)
        data = [{"index": i, "embedding": encode(row)} for i, row in enumerate(rows)]
        return {"object": "list", "data": data}

    def table(self) -> bytes:
        from lfm.core.heavy import safetensors_torch
        from lfm.models.api.embeds import NAME

        return safetensors_torch.save({NAME: self._model.ask(Embeddings).table().detach().float().contiguous()})

    def _stamp(self) -> dict[str, Any]:
        return {"created": int(time.time()), "model": self._name}

    def _usage(self, prompts: list[Any], made: list[Made]) -> dict[str, int] | None:
        """Counts, where the model can count both what it read and what it wrote."""
        counts = [count(self._model, prompt) for prompt in prompts] + [one.counted or 0 for one in made]
        if any(number is None for number in counts):
            return None
        read, written = sum(counts[: len(prompts)]), sum(counts[len(prompts) :])  # type: ignore[arg-type]
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def abilities(model: Model) -> Capabilities:
    """What the protocol can carry of what a model gives."""
    text, logprobs, embeddings, vectors = (kind in model.gives for kind in SERVED)
    exact = model.can(Codec, Logits) and model.facts.task in ("causal-lm", "")
    empty = [wire.Turn(role="user", content="")]
    return Capabilities(
        completions=text,
        chat=text,
        batch=64,
        top_k=wire.MOST_LOGPROBS if logprobs or embeddings else 0,
        echo=exact or logprobs,
        score=logprobs,
        suffix=model.facts.task == "masked-lm",
        embeddings=embeddings,
        vectors=vectors,
        chat_overhead=(bound(rendered(model, empty)) if text else 0) + MARGIN,
    )


def rendered(model: Model, messages: list[wire.Turn]) -> str:
    """Messages as one prompt: by the tokenizer's chat template, or plainly where it has none."""
    tokenizer = model.ask(Codec).tokenizer if Codec in model.gives else None
    turns = [{"role": turn.role, "content": turn.text} for turn in messages]
    if tokenizer is not None and getattr(tokenizer, "chat_template", None):
        from jinja2 import TemplateError

        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError) as error:
            raise Bad(f"the model's chat template does not take these messages: {error}", param="messages") from None
        opening = tokenizer.bos_token or ""
        adds = opening and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        return text.removeprefix(opening) if adds else text  # the tokenizer will put it back
    if len(turns) == 1 and turns[0]["role"] == "user":
        return str(turns[0]["content"])  # a model without a template was never taught turns
    return "".join(f"{turn['role'].capitalize()}: {turn['content']}\n" for turn in turns) + "Assistant:"


def _asked(request: Any, max_tokens: int, **rest: Any) -> Asked:
    seed = request.seed if request.seed is not None else uuid.uuid4().int
    return Asked(
        max_tokens=max_tokens,
        heat=request.heat,
        top_p=1.0 if request.top_p is None else request.top_p,
        stops=request.stops,
        seed=seed % 2**63,
        n=request.n or 1,
        **rest,
    )


def _logprobs(made: Made, asked: Asked) -> dict[str, Any] | None:
    """Completions' form."""
    if asked.logprobs is None:
        return None
    tops = []
    for token in made.tokens:
        best: dict[str, float | None] = {}
        for text, value in token.top:
            best.setdefault(text, finite(value))  # of tokens with one text, the more probable
        tops.append(best or None)
    return {
        "tokens": [token.text for token in made.tokens],
        "token_logprobs": [finite(token.logprob) for token in made.tokens],
        "top_logprobs": tops if asked.logprobs else None,
        "text_offset": [token.offset for token in made.tokens],
    }


def _chat_token(token: Any) -> dict[str, Any]:
    """Chat's form."""
    top = [{"token": t, "logprob": finite(p), "bytes": list(t.encode())} for t, p in token.top]
    return {
        "token": token.text,
        "logprob": finite(token.logprob),
        "bytes": list(token.text.encode()),
        "top_logprobs": top,
    }


def _pieces(made: Made) -> list[str]:
    """The text as it is streamed: by words, each with the space before it."""
    return re.findall(r"\s*\S+|\s+$", made.text)


def _text_events(shape: dict[str, Any], made: list[Made], usage: Any) -> Iterator[dict[str, Any]]:
    for i, one in enumerate(made):
        for text in _pieces(one):
            yield {**shape, "choices": [{"index": i, "text": text, "logprobs": None, "finish_reason": None}]}
        yield {**shape, "choices": [{"index": i, "text": "", "logprobs": None, "finish_reason": one.finish}]}
    if usage:
        yield {**shape, "choices": [], "usage": usage}


def _chat_events(shape: dict[str, Any], made: list[Made], usage: Any) -> Iterator[dict[str, Any]]:
    def event(i: int, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        return {**shape, "choices": [{"index": i, "delta": delta, "logprobs": None, "finish_reason": finish}]}

    for i, one in enumerate(made):
        yield event(i, {"role": "assistant", "content": ""})
        for text in _pieces(one):
            yield event(i, {"content": text})
        yield event(i, {}, one.finish)
    if usage:
        yield {**shape, "choices": [], "usage": usage}
