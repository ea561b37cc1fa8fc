"""One patch beside the others: what it changes, how far they change the same, and what their facts come to with it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lfm.core.model import Model
from lfm.runs.committing import Patch, base_of, held_by, named, read
from lfm.runs.patches import said
from lfm.runs.stacks import Moved


class Again(NamedTuple):
    """Another patch's facts, asked with and without a patch: how many there are, and how many greedy text shows."""

    patch: int
    facts: int
    without: int
    together: int


class Beside(NamedTuple):
    """A patch and the others that are on. moved: what it changes, place by place, and how far they change the same.

    without: the base with them alone; together: with it too, and of facts that contradict its own, its own.
    """

    patch: Patch
    others: tuple[Patch, ...]
    moved: list[Moved]
    without: Model
    together: Model


def beside(directory: Path, number: int) -> Beside:
    """A patch by its number, on or off, beside the others. ConfigError where there is none of it."""
    ledger = read(directory)
    patch, base, stack = named(ledger, number), base_of(directory, ledger), ledger.stack
    mine = held_by(directory, ledger, patch, base)
    held = {p.number: held_by(directory, ledger, p, base) for p in ledger.on if p is not patch}
    others = tuple(p for p in ledger.on if p is not patch)
    config = (patch, *ledger.on)[-1].config
    left = {number: each for number, other in held.items() if (each := stack.cleared(other, mine)) is not None}
    in_order = [(left | {number: mine})[n] for n in sorted([*left, number])]
    return Beside(
        patch,
        others,
        stack.moved(mine, held),
        stack.over(base, stack.whole([*held.values()]), config) if held else base,
        stack.over(base, stack.whole(in_order), config),
    )


def again(found: Beside) -> list[Again]:
    """What the facts of each other patch come to without a patch, and with it."""
    edits = [edit for other in found.others for edit in other.edits]
    then, now = (iter(said(model, edits)) for model in (found.without, found.together))
    return [
        Again(p.number, len(p.edits), sum(next(then) for _ in p.edits), sum(next(now) for _ in p.edits))
        for p in found.others
    ]
