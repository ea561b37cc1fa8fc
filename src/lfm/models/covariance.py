"""How the activations of two modules vary together, at every group of elements that may be permuted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lfm.core.heavy import torch
from lfm.models.symmetry import Group, activations, key

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.model import Batch


class Together(NamedTuple):
    """A group's 2n activations, the first module's n before the second's. outer: (2n, 2n) mean of x xᵀ; mean: (2n,).

    fp64, over all tokens and all layers that read the group; reads: how many layers do. Without any, zeros.
    """

    group: Group
    outer: Tensor
    mean: Tensor
    reads: int

    @property
    def covariance(self) -> Tensor:
        return self.outer - torch.outer(self.mean, self.mean)

    @property
    def correlation(self) -> Tensor:
        """Of elements that never vary, 0."""
        found = self.covariance
        spread = found.diagonal().clamp(min=0).sqrt()
        return found / torch.outer(spread, spread).clamp(min=1e-7)


def across(pairs: Sequence[Together]) -> Callable[[Group], Tensor | None]:
    """For each group that is read and has none inside: (n, n), how the first module's units vary with the second's."""
    told = {key(p.group): p.covariance[: p.group.size, p.group.size :] for p in pairs if p.reads and not p.group.inner}
    return lambda group: told.get(key(group))


def together(modules: Sequence[nn.Module], batches: Iterable[Batch]) -> list[Together]:
    """One for each outermost group, in the symmetry's order. The two modules are of one architecture."""
    kept: list[tuple[Group, Tensor, Tensor, int]] = []
    rows: list[int] = []
    for batch in batches:
        seen = [activations(module, batch) for module in modules]
        for place, (one, other) in enumerate(zip(*seen)):
            if place == len(kept):
                size = 2 * one.group.size
                kept.append((one.group, torch.zeros(size, size).double(), torch.zeros(size).double(), len(one.values)))
                rows.append(0)
            for a, b in zip(one.values, other.values):
                x = torch.cat([a, b], 1).double().cpu()
                kept[place][1].addmm_(x.T, x)
                kept[place][2].add_(x.sum(0))
                rows[place] += len(x)
    return [
        Together(group, outer / max(n, 1), mean / max(n, 1), reads)
        for (group, outer, mean, reads), n in zip(kept, rows)
    ]
