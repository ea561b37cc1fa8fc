"""Exact nearest neighbours by squared Euclidean distance, over keys that may be larger than memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lfm.core.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 16
"""Keys compared at a time."""


def nearest(queries: Tensor, keys: Tensor, k: int, *, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """(distances (Q, k), indices (Q, k)) of the k nearest keys (N, d) of each query (Q, d), nearest first; fp32.

    Fewer than k where there are fewer keys. Squared distances, `chunk` keys at a time: memory holds Q × (chunk + k)
    numbers. Exact, by matrix products; an approximate index (faiss) pays from millions of keys on.
    """
    q = queries.float()
    best_d = torch.empty(len(q), 0)
    best_i = torch.empty(len(q), 0, dtype=torch.long)
    for start in range(0, len(keys), chunk):
        block = keys[start : start + chunk].float()
        distances = (q.square().sum(1, keepdim=True) - 2 * q @ block.T + block.square().sum(1)).clamp_min(0)
        index = torch.arange(start, start + len(block)).expand(len(q), -1)
        both_d = torch.cat([best_d, distances], 1)
        both_i = torch.cat([best_i, index], 1)
        best_d, place = both_d.topk(min(k, both_d.shape[1]), dim=1, largest=False)
        best_i = both_i.gather(1, place)
    return best_d, best_i
