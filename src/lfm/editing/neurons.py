"""Neurons beside a feed-forward layer: each reads what the layer reads, and adds its value where it fires.

    y = FFN(x) + Σ_j act(k_j · x + b_j) v_j

act is the layer's own function, so that this is the layer made wider: a gated layer multiplies such a neuron by 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import msgspec

from lfm.core.errors import DataError
from lfm.core.heavy import F, torch
from lfm.core.method import Parts
from lfm.core.model import Model
from lfm.data.records import Edit
from lfm.editing import memory
from lfm.models import structure

if TYPE_CHECKING:
    from torch import Tensor, nn

SHARED = -1
"""Owner of a neuron that no single edit owns."""


@final
@dataclass(frozen=True)
class Neurons:
    """n neurons of one block: keys (n, width), biases (n,), values (n, width); owner (n,) is the place of the edit that
    each was made for, or SHARED.

    A program that has them gives them as an interface. base: digest of the model that they were made in.
    """

    base: str
    block: int
    edits: tuple[Edit, ...]
    owner: Tensor
    keys: Tensor
    biases: Tensor
    values: Tensor

    def parts(self, model: Model) -> Parts:
        """As a program's parts."""
        state = {"base": self.base, "block": self.block, "edits": [msgspec.to_builtins(e) for e in self.edits]}
        tensors = {"owner": self.owner, "keys": self.keys, "biases": self.biases, "values": self.values}
        return Parts({"model": (model,)}, tensors, state)


def opened(parts: Parts) -> Neurons:
    """The neurons in a program's parts."""
    state, held = parts.state, parts.tensors
    edits = tuple(msgspec.convert(edit, Edit) for edit in state["edits"])
    return Neurons(state["base"], state["block"], edits, held["owner"], held["keys"], held["biases"], held["values"])


def empty(module: nn.Module, base: str, block: int) -> Neurons:
    none = torch.zeros(0, structure.feed_forward(module, structure.all_blocks(module)[block]).width)
    return Neurons(base, block, (), torch.zeros(0, dtype=torch.long), none, torch.zeros(0), none)


def learn(kept: Neurons, more: Neurons) -> Neurons:
    """With the other's edits too; one that is there is not learned twice. DataError where one contradicts another."""
    assert (kept.base, kept.block) == (more.base, more.block), "neurons of different layers"
    kept = taken(kept, range(len(kept.edits)))
    added = taken(more, memory.unknown(kept.edits, more.edits))
    return Neurons(
        kept.base,
        kept.block,
        kept.edits + added.edits,
        torch.cat([kept.owner, added.owner + len(kept.edits)]),
        *(torch.cat([getattr(kept, name), getattr(added, name)]) for name in ("keys", "biases", "values")),
    )


def forget(kept: Neurons, *edits: Edit) -> Neurons:
    """Without these edits' neurons; every other stays, bit for bit. DataError for an edit that is not there."""
    return taken(kept, memory.without(kept.edits, edits))


def taken(kept: Neurons, places: Sequence[int]) -> Neurons:
    """Of these edits alone. DataError where the neurons are shared."""
    if (kept.owner == SHARED).any():
        raise DataError(
            "these neurons are of all their edits together", why="calinet's slots are shared", fix="make them anew"
        )
    rows, owner = memory.owned(kept.owner, places, len(kept.edits))
    edits = tuple(kept.edits[i] for i in places)
    return Neurons(kept.base, kept.block, edits, owner, kept.keys[rows], kept.biases[rows], kept.values[rows])


def fired(act: Callable[[Tensor], Tensor], kept: Neurons, x: Tensor) -> Tensor:
    """(…, n) how much each neuron fires on what the layer reads, x (…, width)."""
    return act(F.linear(x.to(kept.keys), kept.keys, kept.biases))


def attach(module: nn.Module, kept: Neurons) -> Callable[[], None]:
    """From now on the neurons stand beside the layer; returns what takes them off again."""
    if not len(kept.keys):
        return lambda: None
    home = next(module.parameters()).device
    act = structure.activation(module, structure.all_blocks(module)[kept.block])
    here = Neurons(
        kept.base, kept.block, kept.edits, *(t.to(home) for t in (kept.owner, kept.keys, kept.biases, kept.values))
    )
    return beside(module, kept.block, lambda x: fired(act, here, x) @ here.values)


def beside(module: nn.Module, block: int, more: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """From now on a block's feed-forward layer says more(x) more, x (…, width) being what it reads; returns what ends
    that."""
    ffn = structure.feed_forward(module, structure.all_blocks(module)[block])
    said: list[Tensor] = []

    def read(_: Any, args: tuple[Tensor, ...]) -> None:
        said[:] = [more(args[0])]

    def write(_: Any, __: Any, out: Tensor) -> Tensor:
        return out + said.pop().to(out.dtype)

    hooks = [
        module.get_submodule(ffn.up).register_forward_pre_hook(read),
        module.get_submodule(ffn.down).register_forward_hook(write),
    ]

    def off() -> None:
        for hook in hooks:
            hook.remove()

    return off
