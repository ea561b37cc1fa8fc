"""Blocks of a LoRA that keys of edits index: at a token whose key an edit reaches, that edit's block is added.

How far each edit reaches is a function of the set of edits (lfm.editing.memory.ranges), and a block stays as long as
one of its edits does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, final

import msgspec

from lfm.core.heavy import torch
from lfm.core.method import Parts
from lfm.core.model import Model
from lfm.data.records import Edit
from lfm.editing import form, memory
from lfm.editing.keys import projection
from lfm.models import structure

if TYPE_CHECKING:
    from torch import Tensor, nn


@final
@dataclass(frozen=True)
class Blocks:
    """n edits, g blocks of rank r: keys (m, in) of one projection, radii (m,), owner (m,) the place of the edit that a
    key is of; number (n,) the block of each edit; down (g, r, in), up (g, out, r) of each changed linear layer, by its
    name.

    A program that has them gives them as an interface. base: digest of the model that they were made in.
    """

    base: str
    block: int
    edits: tuple[Edit, ...]
    owner: Tensor
    keys: Tensor
    radii: Tensor
    number: Tensor
    down: Mapping[str, Tensor]
    up: Mapping[str, Tensor]

    def parts(self, model: Model) -> Parts:
        """As a program's parts."""
        state = {"base": self.base, "block": self.block, "edits": [msgspec.to_builtins(e) for e in self.edits]}
        tensors = {"owner": self.owner, "keys": self.keys, "radii": self.radii, "number": self.number}
        tensors |= {f"down.{name}": each for name, each in self.down.items()}
        tensors |= {f"up.{name}": each for name, each in self.up.items()}
        return Parts({"model": (model,)}, tensors, state)


def opened(parts: Parts) -> Blocks:
    """The blocks in a program's parts."""
    state, held = parts.state, parts.tensors
    edits = tuple(msgspec.convert(edit, Edit) for edit in state["edits"])
    down, up = (
        {name.removeprefix(kind): each for name, each in held.items() if name.startswith(kind)}
        for kind in ("down.", "up.")
    )
    owner = held.get("owner", torch.arange(len(edits)))  # before an edit could have several keys, none was written
    return Blocks(state["base"], state["block"], edits, owner, held["keys"], held["radii"], held["number"], down, up)


def empty(_: nn.Module, base: str, block: int) -> Blocks:
    none, whole = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    return Blocks(base, block, (), whole, none, none, whole, {}, {})


def learn(kept: Blocks, more: Blocks) -> Blocks:
    """With the other's edits too; one that is there is not learned twice. DataError where one contradicts another."""
    assert (kept.base, kept.block) == (more.base, more.block), "blocks of different layers"
    if not kept.edits:
        return taken(more, memory.unknown((), more.edits))
    added = taken(more, memory.unknown(kept.edits, more.edits))
    if not added.edits:
        return kept
    return Blocks(
        kept.base,
        kept.block,
        kept.edits + added.edits,
        torch.cat([kept.owner, added.owner + len(kept.edits)]),
        torch.cat([kept.keys, added.keys]),
        torch.cat([kept.radii, added.radii]),
        torch.cat([kept.number, added.number + 1 + kept.number.max()]),
        {name: torch.cat([each, added.down[name]]) for name, each in kept.down.items()},
        {name: torch.cat([each, added.up[name]]) for name, each in kept.up.items()},
    )


def forget(kept: Blocks, *edits: Edit) -> Blocks:
    """Without these edits, all else as if they had no keys. DataError for an edit that is not there."""
    return taken(kept, memory.without(kept.edits, edits))


def taken(kept: Blocks, places: Sequence[int]) -> Blocks:
    """Of these edits alone, and the blocks that are still theirs."""
    rows, owner = memory.owned(kept.owner, places, len(kept.edits))
    used, number = kept.number[list(places)].unique(return_inverse=True)
    return Blocks(
        kept.base,
        kept.block,
        tuple(kept.edits[i] for i in places),
        owner,
        kept.keys[rows],
        kept.radii[rows],
        number,
        {name: each[used] for name, each in kept.down.items()},
        {name: each[used] for name, each in kept.up.items()},
    )


def reach(kept: Blocks) -> Tensor:
    """ε (m,): how far each key reaches, given the others; those of one object agree."""
    return memory.ranges(memory.Memory(kept.base, kept.block, kept.edits, kept.owner, kept.keys, kept.keys, kept.radii))


def layers_of(module: nn.Module, block: int, depth: int) -> tuple[str, ...]:
    """Names of the linear layers that a LoRA changes: the projection that keys are read at, and what lies before and
    in the projections of the next depth − 1 blocks' feed-forward layers, in its own stack."""
    stack, place = form.own_stack(module, block)
    names = [projection(module, block)[0]]
    for name in stack[place + 1 : place + depth]:
        ffn = structure.feed_forward(module, name)
        names += [ffn.up, ffn.down]
    return tuple(names)


def attach(module: nn.Module, kept: Blocks) -> Callable[[], None]:
    """From now on the module answers by the blocks; returns what takes them off again.

    Keys are looked up at every token, so that text that is made with a cache, made without, or only scored is the same.
    """
    if not kept.edits:
        return lambda: None
    home = next(module.parameters()).device
    keys, ranges, number = (each.to(home) for each in (kept.keys, reach(kept), kept.number[kept.owner]))
    down, up = ({name: each.to(home) for name, each in lora.items()} for lora in (kept.down, kept.up))
    first, _ = projection(module, kept.block)
    found: list[tuple[Tensor, Tensor]] = []

    def more(name: str, x: Tensor, out: Tensor) -> Tensor:
        ((places, blocks),) = found
        if not len(places):
            return out
        flat = out.reshape(-1, out.shape[-1])
        read = x.reshape(-1, x.shape[-1])[places].to(keys.dtype)
        told = torch.einsum("gor,gri,gi->go", up[name][blocks], down[name][blocks], read)
        return flat.index_add(0, places, told.to(out.dtype)).reshape(out.shape)

    def hook(name: str) -> Any:
        def changed(_: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            if name == first:
                index, inside = memory.lookup(keys, ranges, args[0].reshape(-1, args[0].shape[-1]).to(keys.dtype))
                places = inside.nonzero()[:, 0]
                found[:] = [(places, number[index[places]])]
            return more(name, args[0], out)

        return changed

    hooks = [module.get_submodule(name).register_forward_hook(hook(name)) for name in down]
    return partial(remove, hooks)


def remove(hooks: Sequence[Any]) -> None:
    for hook in hooks:
        hook.remove()
