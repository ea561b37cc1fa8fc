"""What users write for a model or for data, and what it means here: paths, api:URL, zoo:NAME, serve:REF."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from lfm.core.model import Model
from lfm.data.records import Record
from lfm.models import load
from lfm.runs import ledger
from lfm.runs.run import Show, silent


def model(ref: str | Path | Model, *, show: Show = silent, **api: Any) -> Model:
    """The model a reference names. zoo:NAME is made on its first use; serve:REF is that model behind HTTP, here."""
    if isinstance(ref, Model):
        return ref
    text = str(ref)
    if text.startswith("zoo:"):
        from lfm import zoo

        return load(zoo.model(text.removeprefix("zoo:"), show=show), find=ledger.find)
    schemes = {"serve:": lambda inner: _served(inner, **api), "zoo:": lambda inner: model(f"zoo:{inner}", show=show)}
    return load(ref, find=ledger.find, schemes=schemes, **api)


def records(ref: str | Path | Sequence[Record], *, show: Show = silent) -> tuple[Record, ...]:
    """The records a reference names: a file, zoo:NAME, or records as they are."""
    if not isinstance(ref, str | Path):
        return tuple(ref)
    from lfm.data import files

    text = str(ref)
    if text.startswith("zoo:"):
        from lfm import zoo

        return files.read(zoo.data(text.removeprefix("zoo:"), show=show))
    return files.read(ref)


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
