"""One patch beside the others: what it changes, how far they change the same, and what their facts come to with it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lfm.core.model import Model
from lfm.runs.committing import base_of, held_by, named, read
from lfm.runs.patches import said
from lfm.runs.stacks import Moved


class Again(NamedTuple):
    """Another patch's facts, asked with and without a patch: how many there are, and how many greedy text shows."""

    patch: int
    facts: int
    without: int
    together: int


def moved(directory: Path, number: int) -> list[Moved]:
    """What a patch changes, place by place, and how far others change the same."""
    ledger = read(directory)
    base = base_of(directory, ledger)
    held = {p.number: held_by(directory, ledger, p, base) for p in (named(ledger, number), *ledger.on)}
    mine = held.pop(number)
    return ledger.stack.moved(mine, held)


def again(directory: Path, number: int) -> list[Again]:
    """What the facts of each other patch that is on come to without a patch, and with it."""
    others = [p for p in read(directory).on if p.number != number]
    edits = [edit for p in others for edit in p.edits]
    then, now = (iter(said(model, edits)) for model in (without(directory, number), together(directory, number)))
    return [
        Again(p.number, len(p.edits), sum(next(then) for _ in p.edits), sum(next(now) for _ in p.edits)) for p in others
    ]


def without(directory: Path, number: int) -> Model:
    """The base with all patches that are on but this one."""
    return _with(directory, number, itself=False)


def together(directory: Path, number: int) -> Model:
    """The base with all patches that are on, and this one; of facts that contradict its own, its own hold."""
    return _with(directory, number, itself=True)


def _with(directory: Path, number: int, *, itself: bool) -> Model:
    ledger = read(directory)
    patch, base, stack = named(ledger, number), base_of(directory, ledger), ledger.stack
    mine = held_by(directory, ledger, patch, base) if itself else None
    parts = []
    for other in ledger.patches:
        if other is patch:
            parts += [mine] if itself else []
        elif other.on:
            held = held_by(directory, ledger, other, base)
            left = stack.cleared(held, mine) if itself else held
            parts += [left] if left is not None else []
    return stack.over(base, stack.whole(parts), (patch, *ledger.on)[-1].config) if parts else base
