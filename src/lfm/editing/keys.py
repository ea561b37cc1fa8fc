"""Keys and values: what a block's last projection reads and writes, and how it is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lfm.core.heavy import torch
from lfm.editing.rows import Rows
from lfm.models import forward, structure

if TYPE_CHECKING:
    from torch import Tensor, nn


def projection(module: nn.Module, block: int) -> tuple[str, Any]:
    """(name, layer) of the projection that ends a block's feed-forward layer."""
    name = structure.site(module, ("ffn_out", block))[0]
    return name, module.get_submodule(name)


def weight(layer: Any) -> Tensor:
    """A copy of the projection's weight as (out, in) fp64 on the CPU, however it is stored."""
    stored = layer.weight.detach().cpu().double()
    return stored.T.contiguous() if structure.transposed(layer) else stored


def put(layer: Any, base: Tensor, changes: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    """Set the projection to base + Σ b aᵀ, rounded as it will be stored, so that what is measured is what is saved."""
    total = base if not changes else base + product(changes)
    total = total.to(dtype).float()
    with torch.no_grad():
        layer.weight.copy_(total.T if structure.transposed(layer) else total)


def product(changes: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ b aᵀ (out, in) in fp64 of (b, a) as stored."""
    b, a = (torch.stack(vectors).double() for vectors in zip(*changes, strict=True))
    return b.T @ a


def at_subject(module: nn.Module, block: int, rows: Rows) -> tuple[Tensor, Tensor]:
    """(n, in) keys and (n, out) values at the subject's last token of each context; fp64 on the CPU."""
    with torch.no_grad(), structure.watch(module, [("ffn_key", block), ("ffn_out", block)]) as seen:
        forward(module, rows.batch)
    places = torch.arange(rows.contexts), rows.subject[:-1]
    return seen[0].cpu()[places].double(), seen[1].cpu()[places].double()
