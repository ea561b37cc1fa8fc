"""How keys lie in running text: C = E[k kᵀ], uncentred, in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lfm.core.heavy import torch
from lfm.core.method import Run
from lfm.core.model import Codec
from lfm.models import forward, structure
from lfm.models.codec import pad, pad_id
from lfm.models.language import batches

if TYPE_CHECKING:
    from torch import Tensor, nn

ENOUGH = 10
"""Tokens for each dimension of the key: 2506.04226 finds that 2 to 10 give what a hundred times more do."""


def second_moment(module: nn.Module, codec: Codec, block: int, ids: Sequence[Sequence[int]], run: Run) -> Tensor:
    """C (in, in) fp64 on the CPU, of the keys of a block's projection at every token of the rows."""
    total: Any = 0
    groups = batches([len(row) for row in ids])
    for group in run.track(groups, f"covariance of keys, block {block}"):
        batch = pad([ids[i] for i in group], pad_id(codec.tokenizer))
        with torch.no_grad(), structure.watch(module, [("ffn_key", block)]) as seen:
            forward(module, batch)
        keys = seen[0][batch["attention_mask"].bool().to(seen[0].device)]
        keys = keys.cpu().double() if keys.device.type == "mps" else keys.double()
        total = total + keys.T @ keys
    return total.cpu() / sum(map(len, ids))


def loaded(moment: Tensor, ridge: float) -> Tensor:
    """C + ridge·tr(C)/d·I: what can be solved with, however little text C was measured on."""
    return moment + ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def rank_one(change: Tensor, key: Tensor, moment: Tensor, divisor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(b, a) with b aᵀ k = change, the update of least ‖b aᵀ C^½‖: a = u/(uᵀk), u = C⁻¹k. All fp64, vectors.

    divisor: another key in the place of the k that divides.
    """
    u = torch.linalg.solve(moment, key)
    return change, u / (u @ (key if divisor is None else divisor))
