"""A Run in memory, with a work directory that the test owns."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch


class Kept:
    """Like the Run that methods get: seeds by key, steps remembered, curves and notes kept to look at."""

    def __init__(self, work: Path, seed: int = 0) -> None:
        self.work, self.seed = work, seed
        self.curves: dict[str, list[float]] = {}
        self.notes: dict[str, Any] = {}
        self.steps: dict[str, Any] = {}

    def step(self, name: str, fn: Callable[[], Any]) -> Any:
        if name not in self.steps:
            self.steps[name] = fn()
        return self.steps[name]

    def track(self, items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
        return iter(items)

    def note(self, **numbers: float | str) -> None:
        self.notes |= numbers

    def curve(self, name: str, value: float) -> None:
        self.curves.setdefault(name, []).append(value)

    def seed_for(self, *key: object) -> int:
        text = repr((self.seed, *key)).encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1

    def generator(self, *key: object) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed_for(*key))
