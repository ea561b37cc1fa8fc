"""Templates: a record put into words around the place where the model's answer goes."""

from __future__ import annotations

from typing import NamedTuple

from lfm.core.errors import ConfigError
from lfm.data.records import Label, Pair
from lfm.data.wording import wording
from lfm.models.gaps import BLANK, TEXT, TEXT_B, parts


class Asked(NamedTuple):
    """What is put to a model: an answer comes after the prompt, and before the suffix where a model reads that."""

    prompt: str
    suffix: str = ""


def checked(template: str, *, fills: bool) -> str:
    """The template. ConfigError unless it has {text} and at most one {mask}; fills: the model reads what follows that.

    Without {mask} the answer comes at the end. An empty template stands for a record's own wording.
    """
    if template and TEXT not in template:
        raise ConfigError(f"template {template!r} has no {TEXT}", why="each record's text goes there")
    if template.count(BLANK) > 1:
        raise ConfigError(
            f"template {template!r} has {template.count(BLANK)} places for the answer", fix=f"one {BLANK}"
        )
    if BLANK in template and template.partition(BLANK)[2].strip() and not fills:
        raise ConfigError(
            f"template {template!r} goes on after {BLANK}",
            why="this model answers with what comes next, and reads nothing after it",
            fix=f"end it with {BLANK}",
        )
    return template


def frame(template: str) -> str:
    """The template's words ahead of the answer, without a record's."""
    return filled(template, Pair(text="", text_b="", label="")).prompt


def filled(template: str, record: Label | Pair, *, before: str = "") -> Asked:
    """The record in the template's words, after `before`. A record's own text is never read as a template."""
    if not template:
        prompt = wording(record).prompt
        return Asked(before + prompt)
    ahead, mask, behind = template.partition(BLANK)
    known = {TEXT: record.text, TEXT_B: record.text_b if isinstance(record, Pair) else ""}
    prompt = "".join(known.get(part, part) for part in parts(ahead))
    suffix = "".join(known.get(part, part) for part in parts(behind))
    return Asked(before + (prompt.rstrip() if mask else prompt), suffix)
