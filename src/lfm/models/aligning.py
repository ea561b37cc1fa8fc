"""The permutation of one model's weights that brings them nearest to another's: weight matching.

    maximize Σ ⟨θ₀, π(θ₁)⟩ over the symmetry's elements π, group by group in random order until nothing improves

Source: Git Re-Basin, arXiv 2209.04836, algorithm 1. Each group is a linear assignment. Elements with groups of their
own (heads) are assigned by what each pair reaches once its own groups are matched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lfm.core.heavy import torch
from lfm.models.symmetry import Group, Place, permuted
from lfm.models.symmetry import groups as every

if TYPE_CHECKING:
    from torch import Tensor

Named = Mapping[str, "Tensor"]
Moves = list[tuple[Group, "Tensor"]]
Told = tuple[Group, Named]
"""A group's double, of the same size and with the same inside, that acts on the first dimension of matrices: entry
(i, j) is what is gained where position j of the second model comes to position i of the first."""
SWEEPS = 100
"""Far more passes over the groups than weight matching takes."""


def assign(gains: Tensor) -> Tensor:
    """The order (n,) with the greatest Σᵢ gains[i, order[i]]."""
    from scipy.optimize import linear_sum_assignment

    return torch.as_tensor(linear_sum_assignment(gains.double().cpu().numpy(), maximize=True)[1])


def closeness(a: Named, b: Named) -> float:
    """Σ ⟨a, b⟩ over the tensors that both have."""
    return sum(float((a[name].double() * value.double()).sum()) for name, value in b.items() if name in a)


def align(
    a: Named,
    b: Named,
    groups: Sequence[Group],
    generator: torch.Generator,
    gains: Callable[[Group], Told | None] = lambda group: None,
) -> Moves:
    """The moves of b that bring it nearest to a, one after another. Tensors that a lacks are moved, but do not count.

    gains: what decides for a group instead of weights; what it leaves open inside is then decided by weights.
    """
    moves: Moves = []
    rest = []
    for group in groups:
        told = gains(group)
        if told is None:
            rest.append(group)
            continue
        inside, matrices = told
        same = {name: torch.eye(len(matrix), dtype=torch.float64) for name, matrix in matrices.items()}
        own = _numbered([inside], [group])
        moves += [(own[id(one)], order) for one, order in _matched(matrices, same, inside, generator)]
        rest += [own[id(one)] for one in every([inside]) if not one.places]
    now = permuted(b, moves)
    for _ in range(SWEEPS):
        better = False
        for place in torch.randperm(len(rest), generator=generator).tolist():
            made = _matched(a, now, rest[place], generator)
            names = {p.name for p in rest[place].places}
            before = {name: now[name] for name in names}
            after = permuted(before, made)
            gain = closeness(a, after) - closeness(a, before)
            scale = sum(float(a[name].double().square().sum()) for name in names & a.keys())
            if gain > 1e-9 * scale:  # a tensor with the group on two sides may be worse for it
                now, better = now | after, True
                moves += made
        if not better:
            break
    return moves


def _matched(a: Named, b: Named, group: Group, generator: torch.Generator) -> Moves:
    """The moves of one group that serve best while all others stay."""
    places = [place for place in group.places if place.name in a]
    if not group.inner:
        total = torch.zeros(group.size, group.size, dtype=torch.float64)
        for place in places:
            total += _blocks(a, place).flatten(1) @ _blocks(b, place).flatten(1).T
        return [(group, assign(total))]
    total = torch.empty(group.size, group.size, dtype=torch.float64)
    left, right = ([_block(x, places, i) for i in range(group.size)] for x in (a, b))
    all_inside = [_within(child, places, 0) for child in group.inner[0]]
    found: dict[tuple[int, int], Moves] = {}
    inside = [child for child in all_inside if child.places]
    for i in range(group.size):
        for j in range(group.size):
            found[i, j] = align(left[i], right[j], inside, generator)
            total[i, j] = closeness(left[i], permuted(right[j], found[i, j]))
    order = assign(total)
    moves: Moves = []
    for i, j in enumerate(order.tolist()):  # first within the elements where they lie, then the elements themselves
        own = _numbered(all_inside, group.inner[j])
        moves += [(own[id(child)], move) for child, move in found[i, j]]
    return [*moves, (group, order)]


def _blocks(tensors: Named, place: Place) -> Tensor:
    """(n, m, the rest) fp64: what each element of the place holds."""
    tensor = tensors[place.name].double().movedim(place.dim, 0)
    return tensor.reshape(len(tensor), -1)[place.at.to(tensor.device)]


def _block(tensors: Named, places: Sequence[Place], i: int) -> dict[str, Tensor]:
    return {f"{p.name}:{p.dim}": _blocks(tensors, p)[i] for p in places}


def _within(child: Group, places: Sequence[Place], element: int) -> Group:
    """The child of this element as a group of the element's own block."""
    rows = {(p.name, p.dim): p.at[element] for p in places}
    own = tuple(
        Place(f"{p.name}:{p.dim}", 0, torch.searchsorted(rows[p.name, p.dim], p.at), p.read)
        for p in child.places
        if (p.name, p.dim) in rows
    )
    inner = tuple(tuple(_within(c, places, element) for c in each) for each in child.inner)
    return Group(child.size, own, inner, child.pointwise)


def _numbered(inside: Sequence[Group], own: Sequence[Group]) -> dict[int, Group]:
    """Each group of a block, and those within it, by identity → the same one of the whole tensors."""
    found: dict[int, Group] = {}
    for one, other in zip(inside, own):
        found[id(one)] = other
        for first, second in zip(one.inner, other.inner):
            found |= _numbered(first, second)
    return found
