"""What an encoder makes of a part of an image's patches, and a decoder that tells of all of them from it.

A place is a patch, by its number along the rows; class tokens come before the patches, and are always seen. noise
(B, N) tells which patches are seen: those where it is least, as masked autoencoders have it (2111.06377).
Source of the decoder: generic distillation, 2302.14771; its positions are learned here, there sines.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lfm.core.heavy import F, nn, torch
from lfm.models import structure

if TYPE_CHECKING:
    from torch import Tensor


def order(noise: Tensor, mask: float) -> tuple[Tensor, Tensor]:
    """The patches that are seen (B, seen), and where each patch lies when those come first (B, N)."""
    shuffled = noise.argsort(1)
    return shuffled[:, : max(1, int(noise.shape[1] * (1 - mask)))], shuffled.argsort(1)


@contextmanager
def seeing(module: nn.Module, seen: Tensor, beside: int) -> Iterator[None]:
    """Within it the blocks read `beside` class tokens and the patches (B, n) of them alone: what else comes before
    the first block, positions among it, is as it was."""

    def some(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        index = seen.to(x.device)[..., None].expand(-1, -1, x.shape[-1])
        return torch.cat([x[:, :beside], x[:, beside:].gather(1, index)], 1), *args[1:]

    handle = module.get_submodule(structure.blocks(module)[0]).register_forward_pre_hook(some)
    try:
        yield
    finally:
        handle.remove()


def decoder(width: int, told: int, places: int, beside: int, *, inner: int, depth: int) -> nn.Module:
    """(x (B, beside + seen, width), where (B, places)) → (B, beside + places, told): blocks over what was seen and, at
    all other places, one learned token; then two layers that tell."""
    heads = next((n for n in (8, 4, 2, 1) if inner % n == 0 and inner // n >= 8), 1)

    class Decoder(nn.Module):  # made here, so that listing methods loads no torch
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.read = nn.LayerNorm(width), nn.Linear(width, inner)
            self.hidden = nn.Parameter(0.02 * torch.randn(1, 1, inner))
            self.positions = nn.Parameter(0.02 * torch.randn(1, beside + places, inner))
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(
                    inner, heads, 4 * inner, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
            self.tell = nn.Sequential(nn.Linear(inner, told), nn.GELU(), nn.Linear(told, told))

        def forward(self, x: Tensor, where: Tensor) -> Tensor:
            x = self.read(self.norm(x))
            blank = self.hidden.expand(len(x), beside + places - x.shape[1], -1).to(x.dtype)
            patches = torch.cat([x[:, beside:], blank], 1)
            patches = patches.gather(1, where[..., None].expand(-1, -1, inner))
            x = torch.cat([x[:, :beside], patches], 1) + self.positions
            for block in self.blocks:
                x = block(x)
            return self.tell(x)

    return Decoder()


def apart(told: Tensor, target: Tensor, places: int) -> Tensor:
    """Smooth L1 (β = 2) between what was told and the target's channels at mean 0 and variance 1; a scalar.

    Both (B, class tokens + places, C); where the class tokens are not as many, the patches alone.
    """
    if told.shape[1] != target.shape[1]:
        told, target = told[:, -places:], target[:, -places:]
    target = F.layer_norm(target.float(), target.shape[-1:], eps=1e-6)
    return F.smooth_l1_loss(told.float(), target, beta=2.0)
