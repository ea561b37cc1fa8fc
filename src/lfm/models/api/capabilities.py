"""What a server can do: told by our own server, found out from any other by a few tiny requests."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from lfm.core.errors import EndpointError, ModelError
from lfm.core.model import Facts
from lfm.models.api import answers
from lfm.models.api.cache import Cache, digest_of
from lfm.models.api.client import Charge, Client, Closed, Refused
from lfm.models.api.refs import Endpoint

T = TypeVar("T")

EXTENSION = "lfm"
"""Key of a model's entry in /models under which our own server tells its abilities."""

TOP_K = (20, 5, 1)
"""How many alternatives are asked for when probing: vLLM's limit, OpenAI's, and the least."""

MARGIN = 4
"""Tokens that a text may take beyond its bytes: a word-boundary mark and special tokens. Probing may find more."""

TEMPLATE = 256
"""Tokens that a chat template may put around a message; a longer one is not learned, and not budgeted for."""

LIMITS = ("max_tokens", "max_completion_tokens")
"""Names of the most tokens of a chat reply: everyone's, and that of models which refuse it."""

PROBE = {"timeout": 30.0, "retries": 1}


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What one model at one server does.

    batch: prompts a request. top_k, chat_top_k: most alternatives told a token. echo, score: how given text is scored.
    embeddings: of tokens, to and from it; vectors: of whole texts.
    overhead: tokens beyond a prompt's own (template, specials). limit: chat's name for the most tokens.
    """

    completions: bool = False
    chat: bool = False
    batch: int = 1
    top_k: int = 0
    echo: bool = False
    score: bool = False
    suffix: bool = False
    embeddings: bool = False
    vectors: bool = False
    overhead: int = MARGIN
    chat_overhead: int = MARGIN
    chat_top_k: int = 0
    limit: str = "max_tokens"


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What our own server tells in /models."""

    digest: str
    can: Capabilities
    facts: dict[str, Any] = {}


def bound(text: str) -> int:
    """The most tokens a text can make: a token covers at least a byte of some normal form of it."""
    forms = (text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD")))
    return max(len(form.encode("utf-8", "surrogatepass")) for form in forms)


def named(client: Client, endpoint: Endpoint) -> tuple[Endpoint, Told | None, int]:
    """The endpoint with its model's name, and what the server tells of it unasked: our own server its abilities, and
    some others how many tokens it reads (0 where it does not say)."""
    try:
        entries = answers.read(client.get("/models", **PROBE), answers.Models, endpoint.url).data
    except (Refused, EndpointError) as error:
        if not endpoint.model or isinstance(error, Closed):
            raise _plain(endpoint, error) from None
        # transformers' server answers 500 where it has no cache directory, and serves all the same.
        return endpoint, None, 0
    names = [entry["id"] for entry in entries if isinstance(entry.get("id"), str)]
    if not endpoint.model:
        if len(names) != 1:
            some = ", ".join(names[:8]) or "none"
            raise ModelError(
                f"{endpoint.url} serves {len(names)} models",
                why=f"they are: {some}",
                fix=f"name one: {endpoint.ref}NAME",
            )
        endpoint = endpoint._replace(model=names[0])
    entry = next((entry for entry in entries if entry.get("id") == endpoint.model), {})
    if EXTENSION not in entry:
        context = entry.get("max_model_len")
        return endpoint, None, context if isinstance(context, int) and context > 0 else 0
    try:
        return endpoint, msgspec.convert(entry[EXTENSION], Told), 0
    except msgspec.ValidationError as error:
        raise EndpointError(f"{endpoint.url} tells abilities that make no sense", why=str(error)) from None


def probed(client: Client, endpoint: Endpoint, cache: Cache) -> Capabilities:
    """What a server does, by trying. Asked once for a URL and model, then remembered."""
    question = digest_of({"capabilities": endpoint.url, "model": endpoint.model})
    if kept := cache.get([question]).get(question):
        return msgspec.json.decode(kept, type=Capabilities)
    can = _probe(client, endpoint)
    cache.put({question: msgspec.json.encode(can)})
    return can


def facts_of(told: Told | None, context: int = 0) -> Facts:
    """What is known of the model behind an endpoint. context: the tokens it reads, as other servers than ours tell."""
    known = {"task": "causal-lm", "context": context} if told is None else told.facts
    plain = Facts()
    found = {
        name: tuple(map(str, known[name])) if name == "labels" else known[name]
        for name, default in zip(Facts._fields, plain, strict=True)
        if isinstance(known.get(name), list if name == "labels" else type(default))
    }
    return plain._replace(**found)


def _probe(client: Client, endpoint: Endpoint) -> Capabilities:
    url, tiny = endpoint.url, {"model": endpoint.model, "max_tokens": 1, "temperature": 0}
    failures: list[Exception] = []
    spent: list[int] = []

    def completion(body: Mapping[str, Any], prompts: int = 1) -> list[answers.Choice] | None:
        try:
            content = client.post(
                "/completions", {**tiny, **body}, Charge(prompts, 16 * prompts), answers.used, **PROBE
            )
            spent.append(answers.used(content) or 0)
            return answers.in_order(answers.read(content, answers.Completion, url).choices, prompts, url)
        except (Refused, EndpointError) as error:
            if isinstance(error, Closed):
                raise
            failures.append(error)
            return None

    def chat(limit: str, tops: int = 0) -> int | None:
        """Tokens that one word and one token of an answer take, its template included; None where it does not chat, or
        does not tell so many alternatives."""
        body = {"model": endpoint.model, limit: 1, "messages": [{"role": "user", "content": "a"}]}
        more = {"logprobs": True, "top_logprobs": tops} if tops else {}
        try:
            content = client.post("/chat/completions", body | more, Charge(1, TEMPLATE), answers.used, **PROBE)
            (choice,) = answers.in_order(answers.read(content, answers.Chat, url).choices, 1, url)
            if tops:
                answers.best_said(choice, tops, url)
            return answers.used(content) or MARGIN
        except (Refused, EndpointError) as error:
            failures.append(error)
            return None

    def vectors() -> bool:
        """Whether it makes vectors of two texts at once: models of vectors do nothing else."""
        body = {"model": endpoint.model, "input": ["a", "b"], "encoding_format": "float"}
        try:
            content = client.post("/embeddings", body, Charge(2, 2 * MARGIN), answers.used, **PROBE)
            told = answers.in_order(answers.read(content, answers.Vectors, url).data, 2, url)
            return len({len(answers.vector(one, url)) for one in told}) == 1
        except (Refused, EndpointError) as error:
            failures.append(error)
            return False

    plain = completion({"prompt": "a"}) is not None
    overhead = max(spent, default=0) + MARGIN
    top_k = next((k for k in TOP_K if plain and _tells(completion({"prompt": "a", "logprobs": k}), k, url)), 0)
    echo = bool(top_k) and _works(
        lambda: answers.echoed(
            (completion({"prompt": "a b", "max_tokens": 0, "echo": True, "logprobs": 1}) or [])[0], "a", " b", url
        )
    )
    batch = 16 if plain and completion({"prompt": ["a", "b"]}, 2) is not None else 1
    limit = LIMITS[0]
    template = chat(limit)
    if template is None and LIMITS[1] in str(failures[-1]):
        limit = LIMITS[1]
        template = chat(limit)
    asks = template is not None and not top_k
    chat_top_k = next((k for k in TOP_K if asks and chat(limit, k) is not None), 0)
    if not plain and template is None and vectors():
        return Capabilities(vectors=True, batch=16)
    if not plain and template is None:
        raise EndpointError(
            f"{url} does neither completions nor chat nor embeddings for {endpoint.model!r}",
            why=str(failures[0]),
            fix="check the model's name and that the URL ends where the API begins (often /v1)",
        )
    return Capabilities(
        completions=plain,
        chat=template is not None,
        batch=batch,
        top_k=top_k,
        echo=echo,
        overhead=overhead,
        chat_overhead=(template or 0) + MARGIN,
        chat_top_k=chat_top_k,
        limit=limit,
    )


def _tells(choices: list[answers.Choice] | None, k: int, url: str) -> bool:
    return choices is not None and _works(lambda: answers.best(choices[0], k, url))


def _works(attempt: Callable[[], Any]) -> bool:
    """Whether an answer is what the protocol says. A server that ignores a field lacks the ability."""
    try:
        attempt()
    except (EndpointError, IndexError):
        return False
    return True


def _plain(endpoint: Endpoint, error: Exception) -> EndpointError:
    if isinstance(error, EndpointError):
        return error
    begins = "" if endpoint.url.endswith("/v1") else f"api:{endpoint.url}/v1, where most servers begin; or "
    return EndpointError(f"{endpoint.url} lists no models", why=str(error), fix=f"{begins}name one: {endpoint.ref}NAME")
