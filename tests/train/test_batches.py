"""once: prepared records are the records that collate would prepare, and only where that is possible."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from lfm.train import once

ROWS = [(torch.arange(6.0).reshape(2, 3) + i, i) for i in range(100)]


def collate(rows: Sequence[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    calls.append(len(rows))
    return {"pixel_values": torch.stack([r[0] for r in rows]), "labels": torch.tensor([r[1] for r in rows])}


calls: list[int] = []


@pytest.mark.parametrize("limit", [2**30, 100])
def test_batches_are_those_that_collate_gives(limit: int) -> None:
    calls.clear()
    numbers, pick = once(ROWS, collate, limit=limit)
    prepared = sum(calls)
    for chosen in ([3, 99, 3], [0]):
        expected, got = collate([ROWS[i] for i in chosen]), pick(chosen)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in got)
    assert list(numbers) == list(range(100))
    again = sum(calls) - prepared - 4
    assert (prepared, again) == ((101, 0) if limit > 100 else (1, 4))  # prepared now, or each time


def test_rows_of_different_length_are_collated_as_they_come() -> None:
    rows = [torch.ones(1 + i // 99) for i in range(100)]
    _, pick = once(rows, lambda some: {"x": torch.nn.utils.rnn.pad_sequence(list(some), batch_first=True)})
    assert pick([0, 1])["x"].shape == (2, 1) and pick([0, 99])["x"].shape == (2, 2)


def test_token_ids_are_never_padded_to_the_longest_of_all() -> None:
    _, pick = once([1] * 3, lambda some: {"input_ids": torch.ones(len(some), max(len(some), 2))})
    assert pick([0, 1, 2])["input_ids"].shape == (3, 3)
