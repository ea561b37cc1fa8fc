"""References to endpoints: api:http://127.0.0.1:8000/v1#model-name."""

from __future__ import annotations

import ipaddress
import os
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

from lfm.core.errors import ModelError, UnsafeError

SCHEME = "api:"
KEYS = ("LFM_API_KEY", "OPENAI_API_KEY")


class Endpoint(NamedTuple):
    """Where a model answers. model: its name there; "" until the server has been asked for the only one it has."""

    url: str
    model: str

    @property
    def ref(self) -> str:
        return f"{SCHEME}{self.url}#{self.model}"

    @property
    def local(self) -> bool:
        """Whether it is this machine that answers."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")


def endpoint_of(ref: str) -> Endpoint:
    """The endpoint that a reference names. UnsafeError, without repeating it, if the URL carries credentials."""
    try:
        parts = urlsplit(ref.removeprefix(SCHEME))
        _ = parts.port
    except ValueError:
        raise ModelError("that is not the URL of an endpoint", fix="write api:http://host:port/v1#model") from None
    if parts.username is not None or parts.password is not None or parts.query:
        raise UnsafeError(
            f"the reference to {parts.hostname} carries credentials or a query string",
            why="references are written into run.json, cards and logs",
            fix=f"put the key into the environment variable {KEYS[0]} and write {SCHEME}{parts.scheme}://{parts.hostname}/…",
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or " " in parts.netloc + parts.path:
        raise ModelError(
            f"{ref!r} names no endpoint", fix="write api:http://host:port/v1#model; https for another machine"
        )
    return Endpoint(urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", "")), parts.fragment)


def key_for(endpoint: Endpoint) -> str | None:
    """The key to send: from the environment, and only over https or to this machine."""
    if not endpoint.local and not endpoint.url.startswith("https:"):
        return None
    name = next((name for name in KEYS if os.environ.get(name, "").strip()), None)
    key = os.environ[name].strip() if name else None
    if key and not (key.isascii() and key.isprintable()):
        raise ModelError(f"{name} holds characters that no header can carry", fix="set it to the key alone")
    return key
