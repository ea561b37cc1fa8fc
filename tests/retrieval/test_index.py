"""Nearest neighbours are those of the whole distance matrix, however the keys are cut."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from lfm.retrieval.index import nearest


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 12), st.integers(1, 17), st.integers(0, 99))
def test_chunks_change_nothing(n: int, q: int, k: int, chunk: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    keys, queries = torch.randn(n, 5, generator=random), torch.randn(q, 5, generator=random)
    distances, found = nearest(queries, keys, k, chunk=chunk)
    whole = torch.cdist(queries.double(), keys.double()).square()
    expected = whole.topk(min(k, n), dim=1, largest=False).values
    torch.testing.assert_close(distances.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.gather(1, found), expected, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 99))
def test_the_order_of_the_keys_changes_no_distance(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    keys, queries = torch.randn(30, 4, generator=random), torch.randn(3, 4, generator=random)
    order = torch.randperm(30, generator=random)
    distances, found = nearest(queries, keys, 5, chunk=7)
    again, moved = nearest(queries, keys[order], 5, chunk=7)
    assert torch.equal(distances, again)
    assert torch.equal(found, order[moved])


def test_small_distances_far_from_the_origin_keep_their_digits() -> None:
    """‖q‖² − 2qᵀx + ‖x‖² in fp32 is off by whole units here: the norms are of the order of 10⁸."""
    keys = torch.full((4, 8), 4096.0)
    keys[:, 0] += torch.tensor([0.0, 1.0, 2.0, 4.0])
    distances, _ = nearest(keys[:1], keys, 4)
    assert distances.tolist() == [[0.0, 1.0, 4.0, 16.0]]


def test_keys_may_lie_in_a_mapped_file(tmp_path: Path) -> None:
    keys = torch.randn(100, 6, generator=torch.Generator().manual_seed(0)).half()
    (tmp_path / "keys.bin").write_bytes(keys.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "keys.bin"), shared=False, size=600, dtype=torch.float16).view(100, 6)
    queries = keys[:5].float()
    for one, other in zip(nearest(queries, mapped, 3, chunk=16), nearest(queries, keys, 3), strict=True):
        assert torch.equal(one, other)


def test_no_queries_find_nothing() -> None:
    distances, found = nearest(torch.empty(0, 3), torch.randn(4, 3), 2)
    assert distances.shape == found.shape == (0, 2)
