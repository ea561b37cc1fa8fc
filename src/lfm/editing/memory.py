"""A memory of edits beside a model's weights: near an edit's key one layer's output is replaced by that edit's value.

Each edit is found alone, and how far it reaches is a function of the *set* of edits. So their order says nothing, and
an edit that is forgotten takes nothing with it: what is left is what had been made without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import msgspec

from lfm.core.errors import DataError
from lfm.core.heavy import torch
from lfm.core.method import Parts
from lfm.core.model import Model
from lfm.data.records import Edit
from lfm.editing.keys import projection
from lfm.models import structure

if TYPE_CHECKING:
    from torch import Tensor, nn


@final
@dataclass(frozen=True)
class Memory:
    """Edits of one block's projection by n keys: keys (n, in), values (n, out), radii (n,), each found for its edit
    alone; owner (n,) is the place of that edit, which has as many keys as places where it is told (of blanks several).

    A program that has one gives it as an interface. base: digest of the model that the edits were made in.
    """

    base: str
    block: int
    edits: tuple[Edit, ...]
    owner: Tensor
    keys: Tensor
    values: Tensor
    radii: Tensor

    def parts(self, model: Model) -> Parts:
        """As a program's parts."""
        state = {"base": self.base, "block": self.block, "edits": [msgspec.to_builtins(e) for e in self.edits]}
        tensors = {"owner": self.owner, "keys": self.keys, "values": self.values, "radii": self.radii}
        return Parts({"model": (model,)}, tensors, state)


def opened(parts: Parts) -> Memory:
    """The memory in a program's parts."""
    state, tensors = parts.state, parts.tensors
    edits = tuple(msgspec.convert(edit, Edit) for edit in state["edits"])
    owner = tensors.get("owner", torch.arange(len(edits)))  # before an edit could have several keys, none was written
    return Memory(state["base"], state["block"], edits, owner, tensors["keys"], tensors["values"], tensors["radii"])


def empty(module: nn.Module, base: str, block: int) -> Memory:
    shape = structure.feed_forward(module, structure.all_blocks(module)[block])
    none = torch.zeros(0, dtype=torch.long)
    return Memory(base, block, (), none, torch.zeros(0, shape.inner), torch.zeros(0, shape.width), torch.zeros(0))


def learn(memory: Memory, more: Memory) -> Memory:
    """The memory with the other's edits too; one that it has is not learned twice.

    DataError where an edit contradicts one in the memory: the same prompt, another object.
    """
    assert (memory.base, memory.block) == (more.base, more.block), "keys of different layers"
    fresh = unknown(memory.edits, more.edits)
    added = taken(more, fresh)
    return Memory(
        memory.base,
        memory.block,
        memory.edits + added.edits,
        torch.cat([memory.owner, added.owner + len(memory.edits)]),
        *(torch.cat([getattr(memory, name), getattr(added, name)]) for name in ("keys", "values", "radii")),
    )


def forget(memory: Memory, *edits: Edit) -> Memory:
    """The memory without these edits, all else as if they had never been. DataError for one that it does not have."""
    return taken(memory, without(memory.edits, edits))


def unknown(kept: Sequence[Edit], more: Sequence[Edit]) -> list[int]:
    """Places of the edits that are not kept yet. DataError where one contradicts a kept one: the same prompt, another
    object."""
    said = {edit.prompt: edit.new_object.strip() for edit in kept}
    fresh: list[int] = []
    for place, edit in enumerate(more):
        known = said.setdefault(edit.prompt, edit.new_object.strip())
        if known != edit.new_object.strip():
            raise DataError(
                f"{edit.prompt!r} cannot become {edit.new_object!r}: the memory has {known!r} for it",
                fix="forget that edit first",
            )
        if not any(same(edit, other) for other in (*kept, *(more[i] for i in fresh))):
            fresh.append(place)
    return fresh


def without(kept: Sequence[Edit], gone: Sequence[Edit]) -> list[int]:
    """Places of the kept edits that are not among these. DataError for one that is not kept."""
    for edit in gone:
        if not any(same(edit, known) for known in kept):
            raise DataError(
                f"the memory has no edit of {edit.prompt!r} to {edit.new_object!r}",
                why=f"it has {len(kept)}: "
                + ", ".join(f"{known.prompt!r} to {known.new_object!r}" for known in kept[:3])
                + ("…" if len(kept) > 3 else ""),
            )
    return [i for i, known in enumerate(kept) if not any(same(edit, known) for edit in gone)]


def same(one: Edit, other: Edit) -> bool:
    """Whether two edits make one prompt say the same thing; what they are checked by may differ."""
    return (one.prompt, one.new_object.strip()) == (other.prompt, other.new_object.strip())


def taken(memory: Memory, places: Sequence[int]) -> Memory:
    """The memory with the edits at these places alone."""
    rows, owner = owned(memory.owner, places, len(memory.edits))
    return Memory(
        memory.base,
        memory.block,
        tuple(memory.edits[i] for i in places),
        owner,
        memory.keys[rows],
        memory.values[rows],
        memory.radii[rows],
    )


def owned(owner: Tensor, places: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """Of rows that `count` edits own, those of the edits at these places, in that order, and whose they then are."""
    new = torch.full((count,), -1)
    new[list(places)] = torch.arange(len(places))
    now = new[owner]
    rows = now.sort(stable=True).indices[int((now < 0).sum()) :]
    return rows, now[rows]


def ranges(memory: Memory) -> Tensor:
    """ε (n,): how far each key reaches, given the others. As in GRACE (2211.11031, algorithm 1) for any two edits.

    Alone each reaches its radius r. Two that agree (one new object) and are no further apart than rᵢ + rⱼ reach as far
    as each other; of two that do not agree neither reaches beyond the middle between them, and that comes first.
    """
    apart = distances(memory.keys, memory.keys)
    told = {text: i for i, text in enumerate(dict.fromkeys(edit.new_object.strip() for edit in memory.edits))}
    label = torch.tensor([told[edit.new_object.strip()] for edit in memory.edits], dtype=torch.long)[memory.owner]
    agree = label[:, None] == label[None]
    reach = memory.radii[:, None] + memory.radii[None]
    far = torch.where(agree & (apart <= reach), apart, 0.0).amax(1, keepdim=True) if len(label) else apart
    widest = torch.maximum(memory.radii[:, None], far)
    middle = torch.where(agree, torch.inf, apart / 2)
    return torch.minimum(widest, middle).amin(1) if len(label) else memory.radii


def distances(one: Tensor, other: Tensor) -> Tensor:
    """(n, m) Euclidean distances, from differences: by products what lies close would come out at random."""
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")


def lookup(keys: Tensor, reach: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """(m,) the nearest key of each query (m, in), and (m,) whether that key reaches it."""
    near = distances(queries, keys).min(1)
    return near.indices, near.values <= reach[near.indices]


def attach(module: nn.Module, memory: Memory) -> Callable[[], None]:
    """From now on the module answers by the memory; returns what takes it off again.

    Keys are looked up at every token, so that text that is made with a cache, made without, or only scored is the same.
    """
    _, layer = projection(module, memory.block)
    home = layer.weight.device
    keys, values, reach = (tensor.to(home) for tensor in (memory.keys, memory.values, ranges(memory)))
    if not len(keys):
        return lambda: None

    def hook(_: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        index, inside = lookup(keys, reach, args[0].reshape(-1, args[0].shape[-1]).to(keys.dtype))
        found = inside.nonzero()[:, 0]
        if not len(found):
            return out
        flat = out.reshape(-1, out.shape[-1])
        return flat.index_copy(0, found, values[index[found]].to(out.dtype)).reshape(out.shape)

    return layer.register_forward_hook(hook).remove
