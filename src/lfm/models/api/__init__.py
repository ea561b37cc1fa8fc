"""Models behind an OpenAI-compatible endpoint: api:http://127.0.0.1:8000/v1#model-name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from lfm.core.interfaces import Embeddings, Logprobs, Text, Top, Vectors
from lfm.core.model import Model
from lfm.models.api import capabilities
from lfm.models.api.cache import Cache, default_cache, digest_of
from lfm.models.api.client import Client, Patience
from lfm.models.api.interfaces import ApiChatTop, ApiEmbeddings, ApiLogprobs, ApiText, ApiVectors, Line
from lfm.models.api.refs import SCHEME as SCHEME
from lfm.models.api.refs import endpoint_of, key_for
from lfm.models.budget import Budget as Budget
from lfm.models.budget import Meter as Meter
from lfm.models.budget import Spent as Spent


def open_api(
    ref: str,
    *,
    budget: Budget | None = None,
    cache: Path | None = None,
    patience: Patience | None = None,
    meter: Meter | None = None,
) -> Model:
    """The model behind an endpoint, giving exactly what the server was seen to do.

    Asks GET /models (free) and, of a server that does not tell its abilities, some tiny requests once (charged).
    cache: the directory of kept answers; the user's cache directory unless given. meter: a budget's ledger that other
    endpoints are charged to as well, instead of `budget`. Keys come from LFM_API_KEY or
    OPENAI_API_KEY. EndpointError where the server hangs, fails or lies; BudgetError where a request would not fit.
    """
    endpoint = endpoint_of(ref)
    meter = meter or Meter(budget or Budget())
    meter.spent()  # a damaged ledger is told of before anything is asked
    client = Client(endpoint, meter, patience or Patience(), key_for(endpoint))
    endpoint, told, context = capabilities.named(client, endpoint)
    answers = Cache(cache or default_cache())
    can = told.can if told else capabilities.probed(client, endpoint, answers)
    # A server on this machine that tells what it serves is known by that, and not by a port that may change.
    known = told.digest if told and endpoint.local else ""
    identity = digest_of({"url": known or endpoint.url, "served": told.digest if told else "", "model": endpoint.model})
    line = Line(client, answers, can, endpoint.model, identity)
    gives: dict[type, Any] = {}
    if can.completions or can.chat:
        gives[Text] = lambda: ApiText(line)
    if can.top_k:
        gives[Top] = lambda: ApiLogprobs(line)
    elif can.chat_top_k:
        gives[Top] = lambda: ApiChatTop(line)
    if can.top_k and (can.echo or can.score):
        gives[Logprobs] = lambda: ApiLogprobs(line)
    if can.top_k and can.embeddings:
        gives[Embeddings] = lambda: ApiEmbeddings(line)
    if can.vectors:
        gives[Vectors] = lambda: ApiVectors(line)
    declared = msgspec.to_builtins(msgspec.structs.replace(can, overhead=0, chat_overhead=0))
    return Model(
        ref=endpoint.ref,
        kind="api",
        gives=gives,
        identify=lambda: digest_of({"identity": identity, "can": declared}),
        look=lambda: capabilities.facts_of(told, context),
    )
