"""KnowledgeEditor's network: what an edit says, read by an LSTM both ways, gates the gradient of each weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, final

from lfm.core.heavy import nn, torch
from lfm.editing.learned import EDIT

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch
    from lfm.editing.learned import Factors


@final
class Gates(nn.Module):
    """Of one weight (in, out): condition (B, c) → r (B, out), c (B, in), s (B, out), d (B, in), η (B, 1).

    r and s are softmaxes over the rows, in units of an even one; c begins near −1 and d near 0: a step downhill.
    """

    def __init__(self, shape: tuple[int, int], condition: int, hidden: int) -> None:
        super().__init__()
        self.inner, self.outer = shape
        self.first = nn.Linear(condition, hidden)
        self.last = nn.Linear(hidden, 2 * sum(shape) + 1)

    def forward(self, condition: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        told = self.last(self.first(condition).tanh())
        sizes = [self.outer, self.inner, self.outer, self.inner, 1]
        r, c, s, d, eta = told.split(sizes, -1)
        return r.softmax(-1) * self.outer, c - 1, s.softmax(-1) * self.outer, d, eta


@final
class Knowledge(nn.Module):
    """An edit's (x, δ), and its words → (x ⊙ c, u σ(η) δ ⊙ r) and (d, u σ(η) s): of every weight
    u σ(η) (∇W ⊙ r cᵀ + s dᵀ), ∇W in units of its usual size (2104.08164, equation 5). embed: ids → (B, T, width)."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        units: Sequence[float],
        embed: Callable[[Tensor], Tensor],
        width: int,
        hidden: int,
        condition: int,
    ) -> None:
        super().__init__()
        self._embed = embed
        self.read = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.condition = nn.Linear(2 * hidden, condition)
        self.gates = nn.ModuleList(Gates(shape, condition, hidden) for shape in shapes)
        self.price = nn.Parameter(torch.ones(()))
        self.register_buffer("units", torch.tensor(list(units)))
        self.register_buffer("sizes", torch.ones(len(shapes)))

    def measure(self, seen: Sequence[tuple[Tensor, Tensor]]) -> None:
        """The usual size of each weight's gradient: rms(x) rms(δ)."""
        sizes = [float(x.square().mean().sqrt() * d.square().mean().sqrt()) for x, d in seen]
        self.sizes = torch.tensor(sizes).clamp(min=1e-30).to(self.sizes)  # type: ignore[union-attr]

    def told(self, batch: Batch) -> Tensor:
        """(B, condition) of the edits: their prompts and new objects, as a whole."""
        words = self._embed(batch[EDIT + "words"].to(self.price.device)).detach().float()
        packed = nn.utils.rnn.pack_padded_sequence(
            words, batch[EDIT + "counts"].cpu(), batch_first=True, enforce_sorted=False
        )
        _, (last, _) = self.read(packed)
        return self.condition(torch.cat([last[0], last[1]], -1)).tanh()

    def forward(self, factors: Factors, batch: Batch) -> Factors:
        condition = self.told(batch)
        made = []
        for place, (x, delta) in enumerate(factors):
            r, c, s, d, eta = self.gates[place](condition)
            scale = (self.units[place] * eta.sigmoid())[:, None]  # type: ignore[index]
            gated = delta / self.sizes[place] * r[:, None]  # type: ignore[index]
            made.append((torch.cat([x * c[:, None], d[:, None]], 1), scale * torch.cat([gated, s[:, None]], 1)))
        return made
