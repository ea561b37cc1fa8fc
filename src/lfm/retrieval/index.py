"""Exact nearest neighbours by squared Euclidean distance, over keys that may be memory-mapped.

No approximate index (faiss) is used: it is one more dependency, it has settings of its own that trade recall for speed,
and what it finds can depend on the order in which keys came. Here the neighbours are the nearest, ties aside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lfm.core.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 14
"""Keys compared at a time."""

QUERIES = 1 << 10
"""Queries compared at a time: with CHUNK, 64 MiB of distances."""


def nearest(queries: Tensor, keys: Tensor, k: int, *, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """(distances (Q, k), indices (Q, k)) of the k nearest keys (N, d) of each query (Q, d), nearest first; fp32, CPU.

    All N where there are fewer than k. Keys are read `chunk` at a time, so that memory does not grow with their number.
    Neighbours are found by matrix products, and their distances then taken from differences: ‖q‖² − 2qᵀx + ‖x‖² alone
    loses the digits of a distance that is small beside the norms.
    """
    if not len(queries):
        return torch.empty(0, min(k, len(keys))), torch.empty(0, min(k, len(keys)), dtype=torch.long)
    found = [_nearest(part.float().cpu(), keys, k, chunk) for part in queries.split(QUERIES)]
    distances, indices = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(indices)


def _nearest(queries: Tensor, keys: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    distances, indices = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    for start in range(0, len(keys), chunk):
        block = keys[start : start + chunk].float()
        near = torch.addmm(block.square().sum(1), queries, block.T, alpha=-2)  # ‖q‖² is the same for all of a row
        near, place = near.topk(min(k, len(block)), dim=1, largest=False)
        distances, indices = torch.cat([distances, near], 1), torch.cat([indices, place + start], 1)
        distances, place = distances.topk(min(k, distances.shape[1]), dim=1, largest=False)
        indices = indices.gather(1, place)
    exact = torch.stack([(keys[i].float() - q).square().sum(1) for q, i in zip(queries, indices, strict=True)])
    exact, place = exact.sort(dim=1, stable=True)
    return exact, indices.gather(1, place)
