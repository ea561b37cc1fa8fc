"""What users write for a model or for data, and what it means here: paths, api:URL, zoo:NAME, serve:REF."""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from lfm.core.errors import ModelError
from lfm.core.model import Model
from lfm.data.records import Record
from lfm.models import load
from lfm.runs import ledger
from lfm.runs.run import Show, silent


def model(ref: str | Path | Model, *, show: Show = silent, **api: Any) -> Model:
    """The model a reference names. zoo:NAME is made on its first use; serve:REF is that model behind HTTP, here.

    BASE+ADAPTER is a PEFT adapter over that base; ORG/NAME[@REVISION] one that transformers has in its cache.
    """
    if isinstance(ref, Model):
        return ref
    text = str(ref)
    if text.startswith("zoo:"):
        from lfm import zoo

        return load(zoo.model(text.removeprefix("zoo:"), show=show), find=ledger.find)
    if "+" in text and not Path(text).exists():
        base, _, adapter = text.partition("+")
        return over(model(base, show=show, **api), adapter)
    if not Path(text).exists() and (cached := _cached(text)):
        return load(cached, find=ledger.find)
    schemes = {"serve:": lambda inner: _served(inner, **api), "zoo:": lambda inner: model(f"zoo:{inner}", show=show)}
    return load(ref, find=ledger.find, schemes=schemes, **api)


def over(base: Model, adapter: str) -> Model:
    """The adapter in a directory, over this base. MismatchError, once opened, if it was made for another."""
    from lfm.models.adapter import CONFIG, open_adapter

    place = Path(adapter).expanduser()
    if not (place / CONFIG).is_file():
        raise ModelError(f"there is no adapter in {adapter!r}", why=f"it has no {CONFIG}")
    return open_adapter(place.absolute(), lambda where, digest: base)


def _cached(text: str) -> Path | None:
    """A model of the Hub that was downloaded before; nothing is fetched."""
    name, _, revision = text.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return None
    cache = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
    place = Path(cache).expanduser() / f"models--{name.replace('/', '--')}"
    pointer = place / "refs" / (revision or "main")
    commit = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else revision
    found = place / "snapshots" / commit
    return found if commit and found.is_dir() else None


def records(ref: str | Path | Sequence[Record], *, kind: str = "text", show: Show = silent) -> tuple[Record, ...]:
    """The records a reference names: a file, zoo:NAME, or records as they are. kind: what is looked for, told of in
    errors."""
    if not isinstance(ref, str | Path):
        return ref if isinstance(ref, tuple) else tuple(ref)  # a file's records know their lines
    from lfm.data import files

    text = str(ref)
    if text.startswith("zoo:"):
        from lfm import zoo

        return files.read(zoo.data(text.removeprefix("zoo:"), show=show))
    return files.read(ref, kind)


def _served(ref: str, **api: Any) -> Model:
    """A model of this machine behind our own server, in this process, until it ends; its ref stays serve:REF."""
    from dataclasses import replace

    return replace(load(f"api:{_url(ref)}", **api), ref=f"serve:{ref}", _opened={})


@cache
def _url(ref: str) -> str:
    from lfm import serve

    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(serve.running(model(ref)))
