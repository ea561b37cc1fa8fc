"""How the activations of two modules vary together, at every group of elements that may be permuted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lfm.core.heavy import torch
from lfm.models.aligning import Told
from lfm.models.symmetry import Group, Place, Seen, activations, key

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch


class Together(NamedTuple):
    """A group's 2n activations, the first module's n before the second's. outer: (2n, 2n) mean of x xᵀ; mean: (2n,).

    fp64, over all tokens and all layers that read the group; reads: how many layers do. Without any, zeros. Of a group
    with groups inside (heads) n counts all positions of the first layer that reads it, and `more` holds the others.
    """

    group: Group
    outer: Tensor
    mean: Tensor
    reads: int
    inside: Group | None = None
    more: tuple[Together, ...] = ()

    @property
    def size(self) -> int:
        return len(self.mean) // 2

    @property
    def covariance(self) -> Tensor:
        return self.outer - torch.outer(self.mean, self.mean)

    @property
    def correlation(self) -> Tensor:
        """Of elements that never vary, 0."""
        found = self.covariance
        spread = found.diagonal().clamp(min=0).sqrt()
        return found / torch.outer(spread, spread).clamp(min=1e-7)


def across(pairs: Sequence[Together]) -> Callable[[Group], Told | None]:
    """For each group that is read: how the first module's units vary with the second's."""
    told: dict[tuple[str, int, int], Told] = {}
    for pair in pairs:
        if not pair.reads:
            continue
        reads = [pair, *pair.more]
        matrices = {str(k): each.covariance[: each.size, each.size :] for k, each in enumerate(reads)}
        plain = Group(pair.group.size, (Place("0", 0, torch.arange(pair.group.size)[:, None]),))
        told[key(pair.group)] = (plain if pair.inside is None else first(pair.inside), matrices)
    return lambda group: told.get(key(group))


def first(group: Group) -> Group:
    """The group acting on first dimensions."""
    inner = tuple(tuple(first(child) for child in each) for each in group.inner)
    return group._replace(places=tuple(place._replace(dim=0) for place in group.places), inner=inner)


def together(modules: Sequence[nn.Module], batches: Iterable[Batch]) -> list[Together]:
    """One for each outermost group, in the symmetry's order. The two modules are of one architecture."""
    kept: list[tuple[Seen, list[list[Tensor]]]] = []
    for batch in batches:
        both = [activations(module, batch) for module in modules]
        for place, (one, other) in enumerate(zip(*both)):
            if place == len(kept):
                kept.append((one._replace(values=[None] * len(one.values)), []))  # type: ignore[list-item]
            sums = kept[place][1]
            for number, (a, b) in enumerate(zip(one.values, other.values)):
                x = torch.cat([a, b], 1).double().cpu()
                at = number if one.inside else 0
                if at == len(sums):
                    sums.append([torch.zeros(x.shape[1], x.shape[1]).double(), torch.zeros(x.shape[1]).double()])
                    sums[at].append(torch.zeros(()))
                sums[at][0].addmm_(x.T, x)
                sums[at][1].add_(x.sum(0))
                sums[at][2].add_(len(x))
    return [_together(seen, sums) for seen, sums in kept]


def _together(seen: Seen, sums: Sequence[Sequence[Tensor]]) -> Together:
    group, reads = seen.group, len(seen.values)
    means = [(outer / count.clamp(min=1), mean / count.clamp(min=1)) for outer, mean, count in sums]
    if not means:
        size = 2 * group.size
        return Together(group, torch.zeros(size, size).double(), torch.zeros(size).double(), 0)
    found = [Together(group, outer, mean, reads, seen.inside) for outer, mean in means]
    return found[0]._replace(more=tuple(found[1:]))
