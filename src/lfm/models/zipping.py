"""Two models' units merged into as many as one has: whichever are most alike, of one model or of both.

Sources: ZipIt!, arXiv 2305.03053, and its authors' match_tensors_zipit (github.com/gstoica27/ZipIt), from which the
order of steps is taken: the greatest correlation first; a merged unit's correlation with others is the lesser of its
parts', times alpha; each model may merge β n / 2 pairs of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lfm.core.heavy import torch
from lfm.models.symmetry import Group

if TYPE_CHECKING:
    from torch import Tensor


class Zip(NamedTuple):
    """merge (n, 2n): each new unit as a mean of both models' n units; unmerge (2n, n): each unit from the new ones."""

    merge: Tensor
    unmerge: Tensor

    @property
    def within(self) -> int:
        """New units made of one model's alone."""
        first, second = self.unmerge.chunk(2)
        return int(((first.sum(0) == 0) | (second.sum(0) == 0)).sum())


def zipped(correlation: Tensor, alpha: float, beta: float) -> Zip:
    """The greedy matching of 2n units, (2n, 2n) correlations, the first model's before the second's, into n.

    alpha: in [0, 1]; at 0 nothing that was merged is merged again. beta: in [0, 1]; at 0 only pairs of both models.
    The authors' code lets each model merge one pair of its own even at beta 0; here none.
    """
    sims, total = correlation.double().clone(), len(correlation)
    assert total % 2 == 0
    size, none = total // 2, -torch.inf
    model = torch.arange(total) // size  # of a merged unit: its first part's
    budget = [int(size // 2 * beta + 1e-4)] * 2
    sims.fill_diagonal_(none)
    member = torch.eye(total, dtype=torch.float64)
    gone = torch.zeros(total, dtype=torch.bool)
    for origin in (0, 1):
        if not budget[origin]:
            _forbid(sims, model == origin)
    best = sims.max(1)
    value, where = best.values.clone(), best.indices.clone()
    left = total
    while left > size:
        i = int(value.argmax())
        j = int(where[i])
        if value[i] == none:  # all that may is merged: the rest is, though it may not
            _rest(member, gone, model, size)
            break
        i, j = min(i, j), max(i, j)
        merged = _join(sims, i, j, alpha)
        member[:, i] += member[:, j]
        gone[j] = True
        left -= 1
        stale = (where == i) | (where == j)
        stale[[i, j]] = True
        if model[i] == model[j]:
            budget[int(model[i])] -= 1
            if budget[int(model[i])] <= 0:
                own = model == model[i]
                _forbid(sims, own)
                stale |= own & ~gone
        again = stale.nonzero()[:, 0]
        fresh = sims[again].max(1)
        value[again], where[again] = fresh.values, fresh.indices
        higher = merged > value
        value[higher], where[higher] = merged[higher], i
    unmerge = member[:, ~gone]
    return Zip((unmerge / unmerge.sum(0)).T, unmerge)


def _forbid(sims: Tensor, own: Tensor) -> None:
    """No more pairs of these units with each other."""
    sims[own[:, None] & own[None, :]] = -torch.inf


def _join(sims: Tensor, i: int, j: int, alpha: float) -> Tensor:
    """Makes i the two of them, and j nothing; returns i's correlations: the lesser of the two, times alpha."""
    none = -torch.inf
    merged = torch.minimum(sims[i], sims[j])
    merged = torch.where(merged == none, none, merged * alpha) if alpha else torch.full_like(merged, none)
    sims[i], sims[:, i] = merged, merged
    sims[j], sims[:, j] = none, none
    return merged


def _rest(member: Tensor, gone: Tensor, model: Tensor, size: int) -> None:
    """What is left over, alone: one model's units with the other's, in their order."""
    alone = (member.sum(0) == 1) & ~gone
    left, right = ((alone & (model == origin)).nonzero()[:, 0].tolist() for origin in (0, 1))
    for i, j in zip(left, right):
        if int((~gone).sum()) == size:
            break
        member[:, i] += member[:, j]
        gone[j] = True
    for j in [*right[len(left) :], *left[len(right) :]]:  # an odd one of a model joins the first merged unit
        if int((~gone).sum()) == size:
            break
        i = next(k for k in range(len(gone)) if not gone[k] and k != j)
        member[:, i] += member[:, j]
        gone[j] = True


def merged(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], zips: Sequence[tuple[Group, Zip]]
) -> dict[str, Tensor]:
    """½ Σₘ of each tensor, what it writes merged (times 2) and what it reads unmerged, along the zipped groups.

    Where no group is zipped that is the mean. The models' other groups must stand alike already.
    """
    halves = []
    for model, tensors in enumerate((first, second)):
        now = {name: tensor.double() for name, tensor in tensors.items()}
        for group, found in zips:
            n = group.size
            write, read = 2 * found.merge[:, model * n :][:, :n], found.unmerge[model * n :][:n].T
            for place in group.places:
                now[place.name] = _along(now[place.name], place.dim, place.at, read if place.read else write)
        halves.append(now)
    return {name: ((halves[0][name] + halves[1][name]) / 2).to(tensor.dtype) for name, tensor in first.items()}


def _along(tensor: Tensor, dim: int, at: Tensor, matrix: Tensor) -> Tensor:
    """The tensor with its elements along the dimension mixed by (n, n)."""
    turned = tensor.movedim(dim, 0).clone()
    rows = turned[at]
    turned[at] = (matrix @ rows.reshape(len(at), -1)).reshape(rows.shape)
    return turned.movedim(0, dim).contiguous()
