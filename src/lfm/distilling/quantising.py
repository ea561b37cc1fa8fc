"""Weights on a grid of few values, while they train and afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, final

from lfm.core.errors import ConfigError
from lfm.core.heavy import nn, torch
from lfm.models import structure

if TYPE_CHECKING:
    from torch import Tensor

CLIPS = 32
"""Step sizes that are tried, from that of half the largest weight to that of the largest."""


def best_step(rows: Tensor, most: int) -> Tensor:
    """(…, 1) step size s of each row (…, n): of 32, the one whose s · round(w / s), kept to ±most, is nearest to w.

    Nearest in squares, which is what rounding after training does best by (one step from the largest weight, and
    nothing cut off, is among the 32).
    """
    largest = rows.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny * 2**20)
    found, least = largest / most, torch.full_like(largest, float("inf"))
    for clip in torch.linspace(1.0, 0.5, CLIPS).tolist():
        step = largest * (clip / most)
        missed = (on_grid(rows, step, most) - rows).square().sum(-1, keepdim=True)
        found, least = torch.where(missed < least, step, found), torch.minimum(missed, least)
    return found


def on_grid(rows: Tensor, step: Tensor, most: int) -> Tensor:
    """s · round(w / s) with the integers kept to ±most; by the straight-through rule rounding's slope is one.

    Then the slope by s is round(w / s) − w / s inside, ±most outside (1902.08153, eq. 3).
    """
    places = (rows / step).clamp(-most, most)
    return step * (places + (places.round() - places).detach())


@final
class Grid(nn.Module):
    """A layer's weight, kept in full, as it is on its grid: a parametrization of torch's.

    bits: of a weight, its sign among them: integers within ±(2^(bits−1) − 1). group: inputs that share a step; 0: all
    of an output's. turned: the weight is stored (in, out). The steps' logarithms are learned (1903.08066), so that a
    rate means the same for large and small weights; as one vector, so that they do not decay.
    """

    def __init__(self, weight: Tensor, bits: int, group: int, *, turned: bool) -> None:
        super().__init__()
        self.most, self.group, self.turned = 2 ** (bits - 1) - 1, group, turned
        step = best_step(self.rows(weight.detach()), self.most)
        self.log_step = nn.Parameter(step.log().flatten())

    def rows(self, weight: Tensor) -> Tensor:
        """(outputs, groups, inputs of a group)."""
        by_output = (weight.T if self.turned else weight).flatten(1)
        return by_output.unflatten(1, (-1, self.group or by_output.shape[1]))

    def forward(self, weight: Tensor) -> Tensor:
        rows = self.rows(weight)
        step = self.log_step.exp().view(*rows.shape[:-1], 1)
        made = on_grid(rows, step, self.most).flatten(1)
        return made.T.reshape(weight.shape) if self.turned else made.view(weight.shape)

    def reached(self, weight: Tensor) -> tuple[int, int]:
        """How many groups use their largest integer, of how many: only these are found again by rounding to it."""
        rows = self.rows(weight)
        step = self.log_step.exp().view(*rows.shape[:-1], 1)
        full = ((rows / step).round().abs() >= self.most).any(-1)
        return int(full.sum()), full.numel()


def put_on(module: nn.Module, names: Iterable[str], bits: int, group: int = 0) -> int:
    """Put the weights of these layers on grids, in place; how many weights. ConfigError where groups do not divide."""
    from torch.nn.utils import parametrize

    count = 0
    for name in names:
        layer: Any = module.get_submodule(name)
        turned = not isinstance(layer, nn.Conv2d) and structure.transposed(layer)
        inputs = layer.weight.numel() // layer.weight.shape[1 if turned else 0]
        if group and inputs % group:
            whole = max(size for size in range(1, group + 1) if inputs % size == 0)
            raise ConfigError(f"groups of {group} do not divide the {inputs} inputs of {name}", fix=f"group={whole}")
        # it rounds what a step has made of the weight, so there is nothing to invert
        grid = Grid(layer.weight, bits, group, turned=turned)
        parametrize.register_parametrization(layer, "weight", grid, unsafe=True)
        count += layer.weight.numel()
    return count


def settled(module: nn.Module, names: Iterable[str]) -> tuple[int, int]:
    """Make what is on the grid the weights, in place; the groups that use their largest integer, of how many."""
    from torch.nn.utils import parametrize

    full = every = 0
    with torch.no_grad():
        for name in names:
            layer: Any = module.get_submodule(name)
            used, of = layer.parametrizations.weight[0].reached(layer.parametrizations.weight.original)
            full, every = full + used, every + of
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return full, every
