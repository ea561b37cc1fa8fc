"""Nearest neighbours are those of the whole distance matrix, however the keys are cut."""

from __future__ import annotations

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
