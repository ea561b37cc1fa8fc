"""What SERAC trains: the map of its scope classifier, and the change that makes a model answer by what it was told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, final

from lfm.core.heavy import nn, torch
from lfm.core.interfaces import LowRank
from lfm.models import structure

if TYPE_CHECKING:
    from torch import Tensor


@final
class Map(nn.Module):
    """(…, width) → (…, k)."""

    def __init__(self, width: int, k: int, draw: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, k, generator=draw) / (width * k) ** 0.5)

    def forward(self, means: Tensor) -> Tensor:
        return means @ self.weight


@final
class Change(nn.Module):
    """B A beside every linear layer of the blocks; B begins at zero (LoRA, 2106.09685)."""

    def __init__(self, module: nn.Module, rank: int, draw: torch.Generator) -> None:
        super().__init__()
        stack = tuple(f"{block}." for block in structure.all_blocks(module))
        found = [(name, i, o) for name, _, i, o in structure.linears(module) if name.startswith(stack)]
        self.names = [name for name, _, _ in found]
        self.a = nn.ParameterList(torch.randn(min(rank, i, o), i, generator=draw) / i**0.5 for _, i, o in found)
        self.b = nn.ParameterList(torch.zeros(o, min(rank, i, o)) for _, i, o in found)

    @contextmanager
    def beside(self, module: nn.Module) -> Iterator[None]:
        """Within: the module answers with the change."""

        def add(a: Tensor, b: Tensor, _: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
            return out + ((args[0].float() @ a.T) @ b.T).to(out)

        layers = zip(self.names, self.a, self.b, strict=True)
        handles = [module.get_submodule(n).register_forward_hook(partial(add, a, b)) for n, a, b in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def low_rank(self, module: nn.Module) -> dict[str, LowRank]:
        """By layer, what is added to its weight."""
        return {
            name: LowRank(
                b.detach().cpu().contiguous(),
                a.detach().cpu().contiguous(),
                structure.transposed(module.get_submodule(name)),
            )
            for name, a, b in zip(self.names, self.a, self.b, strict=True)
        }


def told_apart(near: Tensor, same: Tensor) -> Tensor:
    """Mean binary cross entropy of p = exp(−near) (n, m) against same (n, m), the few that are the same weighed as much
    as the many that are not."""
    gone = -torch.log(-torch.expm1(-near.clamp(min=1e-6)))
    return near[same].mean() + gone[~same].mean()


__all__: Sequence[str] = ("Change", "Map", "told_apart")
