"""MEND's network: gradients' factors through residual layers of low rank, one pair for each shape of weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

from lfm.core.heavy import nn, torch
from lfm.editing.learned import Factors

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch

DEPTH = 2
TINY = 1e-7


@final
class Residual(nn.Module):
    """z + [s ⊙ (U V z + b) + o]₊ over z (…, width), s and o of each layer's own (2110.11309, section 3.2).

    U, b and o begin at zero, and the gradient passes where the sum is just zero: it begins as the identity, and learns.
    """

    def __init__(self, width: int, rank: int, layers: int, draw: torch.Generator) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(width, min(rank, width)))
        self.v = nn.Parameter(torch.randn(min(rank, width), width, generator=draw) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(layers, width))
        self.offset = nn.Parameter(torch.zeros(layers, width))

    def forward(self, z: Tensor, layer: int) -> Tensor:
        told = (z @ self.v.T) @ self.u.T + self.bias
        return z + (told * self.scale[layer] + self.offset[layer]).clamp(min=0)


@final
class Shared(nn.Module):
    """The network of all weights of one shape: (x, δ) normalised, side by side, through DEPTH residual layers."""

    def __init__(self, shape: tuple[int, int], rank: int, layers: int, draw: torch.Generator) -> None:
        super().__init__()
        self.inner = shape[0]
        width = sum(shape)
        self.stack = nn.ModuleList(Residual(width, rank, layers, draw) for _ in range(DEPTH))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))

    def measure(self, x: Tensor, d: Tensor) -> None:
        """Normalise by the mean and the standard deviation of these (N, in), (N, out)."""
        z = torch.cat([x, d], 1).double()
        self.mean = z.mean(0).float()
        self.spread = z.std(0).float() + TINY

    def forward(self, x: Tensor, d: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        z = (torch.cat([x, d], -1) - self.mean) / self.spread
        for part in self.stack:
            z = part(z, layer)
        return z[..., : self.inner], z[..., self.inner :]


@final
class Mend(nn.Module):
    """Layers of (in, out) shapes, their units u: an edit's (x, δ) → (x̃, −α u δ̃), α learned and begun at 1."""

    def __init__(
        self, shapes: Sequence[tuple[int, int]], units: Sequence[float], rank: int, draw: torch.Generator
    ) -> None:
        super().__init__()
        self.places = [(f"{i}x{o}", list(shapes[:n]).count((i, o))) for n, (i, o) in enumerate(shapes)]
        self.shared = nn.ModuleDict(
            {f"{i}x{o}": Shared((i, o), rank, shapes.count((i, o)), draw) for i, o in dict.fromkeys(shapes)}
        )
        self.rates = nn.Parameter(torch.ones(len(shapes)))
        self.register_buffer("units", torch.tensor(list(units)))

    def measure(self, seen: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Normalise by the (x, δ) of each layer; those of one shape are one sample."""
        for name, shared in self.shared.items():
            chosen = [each for each, (own, _) in zip(seen, self.places, strict=True) if own == name]
            x, d = (torch.cat(each) for each in zip(*chosen, strict=True))
            shared.measure(x, d)  # type: ignore[operator]

    def forward(self, factors: Factors, batch: Batch) -> Factors:
        made = []
        for place, (x, d) in enumerate(factors):
            name, layer = self.places[place]
            reached = (d != 0).any(-1, keepdim=True)  # what no gradient comes to changes nothing
            a, b = self.shared[name](x, d, layer)
            rate = -self.rates[place] * self.units[place]  # type: ignore[index]
            made.append((torch.where(reached, a, 0.0), torch.where(reached, rate * b, 0.0)))
        return made
