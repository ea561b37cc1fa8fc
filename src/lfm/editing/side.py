"""Second copies of one projection beside the first: tokens at which a copy differs much are answered by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import msgspec

from lfm.core.errors import DataError
from lfm.core.heavy import F, torch
from lfm.core.method import Parts
from lfm.core.model import Model
from lfm.data.records import Edit
from lfm.editing import asking, memory, recall
from lfm.editing.form import IGNORED, in_decoder, reading
from lfm.editing.keys import projection
from lfm.models import forward, structure
from lfm.models.language import batches

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch
    from lfm.editing.setting import Setting

TEXT = 32
"""Tokens of a text beside each edit."""


def told(layer: Any, change: Tensor, keys: Tensor) -> Tensor:
    """(…, out) what the copy, the layer's weight as stored plus a change, says more than the layer of keys (…, in)."""
    return keys @ change if structure.transposed(layer) else keys @ change.T


@final
@dataclass(frozen=True)
class Sides:
    """n edits in s copies of a block's projection: changes (s, …) of its weight as stored, thresholds (s,); number (n,)
    is the copy that each edit was trained into, with others.

    A program that has them gives them as an interface. base: digest of the model that they were made in.
    """

    base: str
    block: int
    edits: tuple[Edit, ...]
    number: tuple[int, ...]
    changes: Tensor
    thresholds: Tensor

    def parts(self, model: Model) -> Parts:
        """As a program's parts."""
        edits = [msgspec.to_builtins(edit) for edit in self.edits]
        state = {"base": self.base, "block": self.block, "edits": edits, "number": list(self.number)}
        return Parts({"model": (model,)}, {"changes": self.changes, "thresholds": self.thresholds}, state)


def opened(parts: Parts) -> Sides:
    """The copies in a program's parts."""
    state, tensors = parts.state, parts.tensors
    edits = tuple(msgspec.convert(edit, Edit) for edit in state["edits"])
    return Sides(
        state["base"], state["block"], edits, tuple(state["number"]), tensors["changes"], tensors["thresholds"]
    )


def learn(sides: Sides, more: Sides) -> Sides:
    """With the other's copies too. DataError where an edit is, or contradicts, one that is there."""
    assert (sides.base, sides.block) == (more.base, more.block), "copies of different projections"
    strangers(sides, more.edits)
    return Sides(
        sides.base,
        sides.block,
        sides.edits + more.edits,
        (*sides.number, *(len(sides.changes) + number for number in more.number)),
        torch.cat([sides.changes, more.changes]),
        torch.cat([sides.thresholds, more.thresholds]),
    )


def strangers(sides: Sides, edits: Sequence[Edit]) -> None:
    """DataError where an edit is there already, or contradicts one that is."""
    if len(memory.unknown(sides.edits, edits)) < len(edits):
        raise DataError("the memory has some of these edits", why="a copy is of all its edits", fix="leave them out")


def taken(sides: Sides, places: Sequence[int]) -> Sides:
    """The copies of these edits. DataError for an edit that shares its copy with one that is not among them."""
    left = sorted({sides.number[i] for i in places})
    for place, number in enumerate(sides.number):
        if number in left and place not in set(places):
            raise DataError(
                f"{sides.edits[place].prompt!r} does not come off by itself",
                why=f"one copy was trained on it and on {sides.number.count(number) - 1} other edits",
                fix="take off all of them",
            )
    return Sides(
        sides.base,
        sides.block,
        tuple(sides.edits[i] for i in places),
        tuple(left.index(sides.number[i]) for i in places),
        sides.changes[left],
        sides.thresholds[left],
    )


def attach(module: nn.Module, sides: Sides) -> Callable[[], None]:
    """From now on a token x with ‖(W′ − W) k(x)‖ > threshold is answered by W′, of several such copies by the one where
    that is most (WISE-Retrieve, 2405.14768); returns what takes that off again."""
    _, layer = projection(module, sides.block)
    moved, least = sides.changes.to(layer.weight), sides.thresholds.tolist()

    def hook(_: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        answer, most = out, out.new_zeros(*out.shape[:-1], 1, dtype=moved.dtype)
        for change, threshold in zip(moved, least, strict=True):
            more = told(layer, change, args[0].to(moved))
            far = more.norm(dim=-1, keepdim=True)
            answers = (far > threshold) & (far > most)
            answer, most = torch.where(answers, out + more.to(out), answer), torch.where(answers, far, most)
        return answer

    return layer.register_forward_hook(hook).remove


@contextmanager
def answering(layer: Any, change: Tensor, scope: Tensor) -> Iterator[list[Tensor]]:
    """Within: the copy answers where scope (B, T) is true; the list is filled with ‖(W′ − W) k‖ (B, T)."""
    seen: list[Tensor] = []

    def hook(_: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        more = told(layer, change, args[0])
        seen[:] = [more.norm(dim=-1)]
        return torch.where(scope[..., None], out + more, out)

    handle = layer.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def margins(inside: Tensor, outside: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """What is lost where distances outside exceed α, inside fall short of β, or the two lie less than γ apart: mean of
    each over what violates it (2405.14768, equation 6), an edit's being the mean over its tokens."""
    lost = inside.new_zeros(())
    for amount in (outside - alpha, beta - inside, gamma - (inside[:, None] - outside[None]).flatten()):
        wrong = amount > 0
        lost = lost + (F.relu(amount).sum() / wrong.sum().clamp(min=1))
    return lost


def ties(changes: Sequence[Tensor], density: float) -> Tensor:
    """One change of several: of each the largest share is kept, a sign elected by the sum, the mean of those that agree
    taken (TIES, 2306.01708)."""
    trimmed = []
    for change in changes:
        kept = max(1, round(density * change.numel()))
        least = change.abs().flatten().kthvalue(change.numel() - kept + 1).values
        trimmed.append(torch.where(change.abs() >= least, change, 0.0))
    stacked = torch.stack(trimmed)
    agree = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)


def lessons(here: Setting, block: int, edits: Sequence[Edit]) -> Callable[[Sequence[int]], Batch]:
    """Edits by number and as many texts: of the block's stack, scope is 1 at the tokens that lead to the object and
    real at tokens, 0 elsewhere."""
    asked, decoder = asking.of(here, block, edits), in_decoder(here.module, block)

    def collate(numbers: Sequence[int]) -> Batch:
        told = asked.rows(torch.tensor(list(numbers)))
        text = reading(here.form, here.codec.tokenizer, [here.text[i % len(here.text)][:TEXT] for i in numbers])
        tokens, none = text.tokens(decoder), torch.full_like(text.labels, IGNORED)
        beside = {**text.batch, "labels": none, "scope": torch.zeros_like(tokens), "real": tokens}
        asks = {**told.batch, "labels": told.labels, "scope": told.leads, "real": told.real}
        return {name: stacked([each, beside[name]], IGNORED * (name == "labels")) for name, each in asks.items()}

    return collate


def stacked(parts: Sequence[Tensor], fill: int) -> Tensor:
    """(Σn, T) of rows of several widths."""
    wide = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part.long(), (0, wide - part.shape[1]), value=fill) for part in parts])


def inside(here: Setting, block: int, edits: Sequence[Edit], change: Tensor) -> Tensor:
    """Δ of every token that leads to an edit's object, where those before it in scope are answered by the copy."""
    _, layer = projection(here.module, block)
    asked, found = asking.of(here, block, edits), []
    for group in batches(asked.real.sum(1).tolist()):
        rows = asked.rows(torch.tensor(group))
        scope = rows.leads.to(change.device)
        with torch.no_grad(), answering(layer, change, scope) as far:
            forward(here.module, rows.batch)
        found.append(far[0][scope])
    return torch.cat(found)


def length(here: Setting, block: int) -> float:
    """Mean ‖W k‖ over the probe's tokens."""
    return float(torch.cat(recall.read(here, "ffn_out", block, here.probe)).norm(dim=-1).mean())
