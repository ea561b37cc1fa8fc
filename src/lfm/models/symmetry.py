"""The permutations of a module's weights that leave what it computes as it is, found by following one forward pass.

No architecture is known here: `trace` sees which axes of which weights run together, and every axis that nothing pins
is a group: the residual stream, a feed-forward layer's keys, channels, attention heads (blocks), and within each head
what no rotation holds in place. Heads that share keys move with them; tied weights are one tensor.
Sources: weight spaces' permutation symmetry as in Git Re-Basin, arXiv 2209.04836, there written by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lfm.core.errors import AccessError
from lfm.core.heavy import np, torch
from lfm.core.interfaces import Codec
from lfm.core.model import Model
from lfm.models.axes import Axis, find, leaves, places, terms
from lfm.models.device import forward
from lfm.models.mixing import forward_with
from lfm.models.trace import Trace, trace

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch


class Place(NamedTuple):
    """Where a group acts on a tensor's dimension: at (n, m) int64 holds the m positions of each of its n elements.

    read: the dimension is contracted with an activation (a linear layer's input); else it is what is written.
    """

    name: str
    dim: int
    at: Tensor
    read: bool = False


class Group(NamedTuple):
    """`size` elements that may be permuted, each with all its places at once.

    inner: the groups within each element (a head's own), alike for all; empty where an element is indivisible.
    pointwise: nothing mixes the elements or multiplies two of them but weights: elements may be merged, not only moved.
    """

    size: int
    places: tuple[Place, ...]
    inner: tuple[tuple[Group, ...], ...] = ()
    pointwise: bool = False

    @property
    def block(self) -> int:
        """Positions of the widest place that one element holds."""
        return max(place.at.shape[1] for place in self.places)


class Symmetry(NamedTuple):
    """groups: outermost ones. unknown: operations without a rule that met an axis which might have been permuted."""

    groups: tuple[Group, ...]
    unknown: tuple[str, ...] = ()


class Seen(NamedTuple):
    """Activations where weights read a group: (rows, n) fp32 each; rows counts tokens and what one element consists of.

    Of a group with groups inside (heads) each is (tokens, all positions), on which `inside` acts as on a tensor's
    second dimension; its places are named by their number.
    """

    group: Group
    values: Sequence[Tensor]
    inside: Group | None = None


Permutation = Mapping[tuple[str, int], "Tensor"]
"""(tensor's name, dimension) → which old position comes to each new one."""


def example(model: Model) -> Batch:
    """Something to follow a pass over where no data are given: two texts of unequal length, or two grey images."""
    codec = model.ask(Codec)
    try:
        batch = codec.texts(["one two three four", "five"])
    except AccessError:
        return codec.images([np.full((32, 32, 3), 128, dtype=np.uint8)] * 2)
    return {**batch, "labels": batch["input_ids"]} if model.facts.task == "seq2seq-lm" else batch


def symmetry(module: nn.Module, batch: Batch) -> Symmetry:
    """What may be permuted, by one forward pass over the batch: a small one will do."""
    return _symmetry(trace(module, batch))


def _symmetry(t: Trace) -> Symmetry:
    found = _Found(t)
    return Symmetry(tuple(found.groups()), tuple(sorted(t.unknown)))


def activations(module: nn.Module, batch: Batch) -> list[Seen]:
    """Each outermost group with the activations that weights read it from; in the groups' order."""
    t = trace(module, batch)
    found = _Found(t)
    out = []
    for leaf in found.outermost():
        group = found.group(leaf, {})
        reads = [read for read in t.reads if leaf in leaves(read[2])]
        flat = [_rows(x, axes, axis, batch) for x, axes, axis in reads]
        on = {(str(k), 1): places(axis) for k, (_, _, axis) in enumerate(reads)}
        if group.inner:
            out.append(Seen(group, flat, found.group(leaf, {}, on)))
        else:
            out.append(Seen(group, [_alike(x, each[leaf], leaf.size) for x, each in zip(flat, on.values())]))
    return out


def _alike(rows: Tensor, where: Tensor, size: int) -> Tensor:
    index = _index(where, torch.ones_like(where, dtype=torch.bool), size)
    return rows[:, index.to(rows.device)].transpose(1, 2).reshape(-1, size)


def _rows(x: Tensor, axes: Sequence[Axis], axis: Axis, batch: Batch) -> Tensor:
    dim = next(i for i, other in enumerate(axes) if other is axis)
    flat = x.detach().float().movedim(dim, -1)
    mask = batch.get("attention_mask")
    if mask is not None and mask.numel() * flat.shape[-1] == flat.numel():  # padding says nothing
        flat = flat.reshape(-1, flat.shape[-1])[mask.reshape(-1).bool().to(flat.device)]
    return flat.reshape(-1, flat.shape[-1])


def _index(where: Tensor, kept: Tensor, size: int) -> Tensor:
    """(size, m): the kept positions of each element, by where they lie on the leaf."""
    positions = ((where >= 0) & kept).nonzero()[:, 0]
    return positions[where[positions].argsort(stable=True)].reshape(size, -1)


class _Found:
    """A trace's free leaves, where each lies, and which lie within each element of another."""

    def __init__(self, t: Trace) -> None:
        self.trace = t
        self.where: dict[tuple[str, int], dict[Axis, Tensor]] = {}
        for name, axes in t.weights.items():
            for dim, axis in enumerate(axes):
                if any(not leaf.pinned for leaf in leaves(axis)):
                    self.where[name, dim] = places(axis)
        self.read = {id(axis) for axis in t.contracted}
        order: dict[Axis, int] = {}
        for _, _, axis in t.reads:
            for leaf in leaves(axis):
                order.setdefault(leaf, len(order))
        free = {leaf: None for on in self.where.values() for leaf in on if not leaf.pinned and leaf.size > 1}
        self.free = sorted(free, key=lambda leaf: order.get(leaf, len(order)))  # stable: then as the weights come
        self.terms = [terms(axes) for axes in {tuple(map(find, axes)): None for axes in t.seen}]
        self.mixed = [tuple([leaf for axis in axes for leaf in leaves(axis)] for axes in pair) for pair in t.mixed]
        self.bound = {leaf for axis in t.tied for leaf in leaves(axis)}
        self.bound |= {leaf for over, _ in self.mixed for leaf in over}
        self.parent: dict[Axis, Axis | None] = {}
        for leaf in reversed(self.free):  # of two that could each hold the other the outer one does
            self.parent[leaf] = self._parent(leaf)

    def outermost(self) -> list[Axis]:
        return [leaf for leaf in self.free if self.parent[leaf] is None]

    def groups(self) -> Iterator[Group]:
        for leaf in self.free:
            parent = self.parent[leaf]
            if parent is None:
                yield self.group(leaf, {})
            elif parent not in self.free:  # within each of what is itself held in place
                for i in range(parent.size):
                    yield self.group(leaf, {parent: i})

    def group(
        self, leaf: Axis, at: Mapping[Axis, int], where: Mapping[tuple[str, int], Mapping[Axis, Tensor]] | None = None
    ) -> Group:
        """The leaf's group within these elements of what it lies in; of weights, or of what else lies on its axis."""
        found = []
        for (name, dim), on in (self.where if where is None else where).items():
            if leaf in on:
                kept = torch.ones_like(on[leaf], dtype=torch.bool)
                for parent, i in at.items():
                    kept &= on[parent] == i
                read = where is None and id(self.trace.weights[name][dim]) in self.read
                found.append(Place(name, dim, _index(on[leaf], kept, leaf.size), read))
        children = [child for child in self.free if self.parent[child] is leaf]
        inner = [tuple(self.group(child, {**at, leaf: i}, where) for child in children) for i in range(leaf.size)]
        return Group(leaf.size, tuple(found), tuple(inner) if children else (), leaf not in self.bound)

    def _parent(self, leaf: Axis) -> Axis | None:
        """The leaf that this one may be permuted differently within each element of: the smallest blocks' one."""
        own = [on for on in self.where.values() if leaf in on]
        above = [p for p in own[0] if p is not leaf and p.size > 1 and all(self._within(leaf, p, on) for on in own)]
        above = [p for p in above if leaf not in self._line(p) and self._apart(leaf, p)]
        return max(above, key=lambda p: sum(q is p or self._apart(p, q) for q in above), default=None)

    def _line(self, leaf: Axis | None) -> Iterator[Axis]:
        while leaf is not None:
            yield leaf
            leaf = self.parent.get(leaf)

    @staticmethod
    def _within(leaf: Axis, parent: Axis, on: Mapping[Axis, Tensor]) -> bool:
        return parent in on and bool((on[parent][on[leaf] >= 0] >= 0).all())

    def _apart(self, leaf: Axis, parent: Axis) -> bool:
        """Whether no operation lets what lies in one of the parent's elements meet what lies in another there."""
        for tensor in self.terms:
            if not tensor:
                return False
            for term in tensor:
                if term.count(parent) > 1 or (leaf in term and (term.count(leaf), term.count(parent)) != (1, 1)):
                    return False
        return not any(parent in over and leaf in whole and leaf not in over for over, whole in self.mixed)


def key(group: Group) -> tuple[str, int, int]:
    """What tells an outermost group from the others of its module, the same in every pass."""
    place = group.places[0]
    return place.name, place.dim, int(place.at[0, 0])


def groups(found: Sequence[Group]) -> Iterator[Group]:
    """All groups, those within others before them."""
    for group in found:
        for inner in group.inner:
            yield from groups(inner)
        yield group


def moved(tensors: Mapping[str, Tensor], group: Group, order: Tensor) -> dict[str, Tensor]:
    """The tensors of the group's places with its element order[i] where i was; other tensors are left out."""
    found: dict[str, Tensor] = {}
    for name, dim, index, _ in group.places:
        tensor = found.get(name, tensors[name])
        whole = torch.arange(tensor.shape[dim])
        whole[index.reshape(-1)] = index[order].reshape(-1)
        found[name] = tensor.index_select(dim, whole.to(tensor.device))
    return found


def permuted(tensors: Mapping[str, Tensor], moves: Sequence[tuple[Group, Tensor]]) -> dict[str, Tensor]:
    """The tensors after these moves, one after another."""
    found = dict(tensors)
    for group, order in moves:
        found |= moved(found, group, order)
    return found


def drawn(found: Symmetry, generator: torch.Generator) -> list[tuple[Group, Tensor]]:
    """A random element of the symmetry, as moves."""
    return [(group, torch.randperm(group.size, generator=generator)) for group in groups(found.groups)]


def difference(module: nn.Module, tensors: Mapping[str, Tensor], batch: Batch) -> float:
    """max |Δ logits| / max |logits| where these tensors stand in place of the module's own."""
    with torch.no_grad():
        own, other = forward(module, batch), forward_with(module, tensors, batch)
    return float((own - other).abs().max() / own.abs().max())
