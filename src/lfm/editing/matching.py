"""The gate of natural-language patches: does a text say what a condition asks for?"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from lfm.core.heavy import F, nn, torch

if TYPE_CHECKING:
    from torch import Tensor


@final
class Gate(nn.Module):
    """(B, T, width), (B, C, width) input embeddings of texts and of conditions → (B,) log odds that they hold:

    b − Σᵢ softplus(w·cᵢ + a) · (1 − maxⱼ cos(M cᵢ, M tⱼ)),   over the condition's tokens, and over its pairs of tokens.

    So each token counts for as much as it asks for, and missing one is not made up for by another.
    """

    def __init__(self, width: int, k: int, draw: torch.Generator) -> None:
        super().__init__()
        self.maps = nn.ParameterList(torch.randn(n * width, k, generator=draw) / width**0.5 for n in (1, 2))
        self.weights = nn.ParameterList(torch.zeros(n * width) for n in (1, 2))
        self.offsets = nn.Parameter(torch.tensor([1.0, -1.0]))
        self.bias = nn.Parameter(torch.ones(()))

    def forward(self, texts: Tensor, reads: Tensor, asked: Tensor, asks: Tensor) -> Tensor:
        """reads (B, T), asks (B, C): where there are tokens, and not padding."""
        odds = self.bias.expand(len(texts))
        for n in (0, 1):
            (text, here), (condition, there) = (_runs(x, mask, n) for x, mask in ((texts, reads), (asked, asks)))
            if not condition.shape[1] or not text.shape[1]:
                continue
            alike = F.normalize(condition @ self.maps[n], dim=-1) @ F.normalize(text @ self.maps[n], dim=-1).mT
            best = alike.masked_fill(~here[:, None], -1.0).amax(-1)
            odds = odds - (F.softplus(condition @ self.weights[n] + self.offsets[n]) * there * (1 - best)).sum(1)
        return odds


def _runs(embeds: Tensor, mask: Tensor, more: int) -> tuple[Tensor, Tensor]:
    """Each token (more = 0), or each two that follow each other (1), at length √width; and which there are."""
    embeds, mask = F.rms_norm(embeds, embeds.shape[-1:], eps=1e-12), mask.bool()
    if not more:
        return embeds, mask
    return torch.cat([embeds[:, :-1], embeds[:, 1:]], -1), mask[:, :-1] & mask[:, 1:]


__all__ = ("Gate",)
