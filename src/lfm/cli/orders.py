"""A command line's words → what lfm.runs is asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm.core import registry
from lfm.core.errors import ConfigError, SlotError

if TYPE_CHECKING:
    from lfm.runs import Order


def pairs(words: Sequence[str], what: str) -> list[tuple[str, str]]:
    """`key=value` words in parts. ConfigError for a word without `=`."""
    found = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r} is not {what}", fix=f"write {what}")
        found.append((key, value))
    return found


def settings(words: Sequence[str]) -> dict[str, Any]:
    """`--set key=value` words as a mapping; a value in brackets or braces is JSON, but for a template's {gap}.

    A number may begin with its point.
    """
    import json
    import re

    found: dict[str, Any] = {}
    for key, value in pairs(words, "--set KEY=VALUE"):
        if value[:1] in ("[", "{") and not re.match(r"\{\w+\}", value):
            try:
                found[key] = json.loads(value)
            except json.JSONDecodeError as error:
                raise ConfigError(f"--set {key}: {value} is not JSON", why=str(error)) from None
        else:
            found[key] = re.sub(r"^(-?)(\.\d+(?:[eE][-+]?\d+)?)$", r"\g<1>0\2", value)
    return found


def roles(id: str, words: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """`role=ref` words as models and data of a method. SlotError names the method's roles."""
    method = registry.get(id).method
    models: dict[str, list[str]] = {}
    data: dict[str, str] = {}
    known = [*method.models, *method.data]
    for role, ref in pairs(words, "ROLE=REF"):
        if role in method.models:
            models.setdefault(role, []).append(ref)
        elif role in data:
            raise SlotError(
                f"{role!r} is given twice", why="one file fills a data role", fix="put the records together"
            )
        elif role in method.data:
            data[role] = ref
        else:
            near = get_close_matches(role, known, n=1)
            why = f"models: {', '.join(method.models)}; data: {', '.join(method.data) or 'none'}"
            raise SlotError(f"{id} has no role {role!r}", why=why, fix=f"did you mean {near[0]!r}?" if near else "")
    return models, data


def order(
    id: str,
    words: Sequence[str],
    *,
    sets: Sequence[str] = (),
    out: Path | None = None,
    seed: int = 0,
    evals: Sequence[str] = (),
    form: str = "",
    queries: int | None = None,
    tokens: int | None = None,
    allow_nonfinite: bool = False,
    memory: str = "",
) -> Order:
    """The order that a command line places."""
    from lfm.runs import Order
    from lfm.runs.command import command

    models, data = roles(id, words)
    limits: dict[str, Any] = {"allow_nonfinite": allow_nonfinite, "memory": size(memory)}
    place, chosen, budget = out if out is not None else default_out(id), settings(sets), (queries, tokens)
    return Order(
        id=id,
        models=models,
        data=data,
        settings=chosen,
        out=place,
        seed=seed,
        evals=tuple(evals),
        form=form,
        budget=budget,
        command=command(id, models, data, chosen, place, seed=seed, evals=evals, form=form, budget=budget, **limits),
        **limits,
    )


def size(text: str) -> int | None:
    """Bytes of `200MB`, `1.5GiB` or `300000000`; None of nothing. ConfigError for anything else."""
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if not found or (found[3] and not found[2]):
        raise ConfigError(f"{text!r} is no size", fix="write it as 800MB, 1.5GB, 2GiB or in bytes")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))


def default_out(name: str) -> Path:
    """Where a run goes unless told otherwise."""
    return Path("runs") / name.rsplit(".", 1)[-1]
