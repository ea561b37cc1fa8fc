"""The Run that methods get."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, final

from lfm.core import launched
from lfm.core.heavy import torch
from lfm.runs import journal, together

if TYPE_CHECKING:
    import torch as torch_types

T = TypeVar("T")

Show = Callable[[str, int, int | None], None]
"""(label, done, total): called as work advances; total None where it is not known."""


def silent(label: str, done: int, total: int | None) -> None:
    """Shows nothing."""


@final
@dataclass
class LocalRun:
    """A run in this process. work: its directory, which outlives a kill."""

    seed: int
    work: Path
    show: Show = silent
    notes: dict[str, float | str] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    _named: set[str] = field(default_factory=set)

    def step(self, name: str, fn: Callable[[], T]) -> T:
        keep = self._keeping(name, fn)
        return keep() if launched.size() == 1 else together.step(name, journal.kept(self._steps, name), fn, keep)

    def once(self, name: str, fn: Callable[[], T]) -> T:
        keep = self._keeping(name, fn)
        return keep() if launched.size() == 1 else together.once(name, keep)

    @property
    def _steps(self) -> Path:
        return self.work / "steps"

    def _keeping(self, name: str, fn: Callable[[], T]) -> Callable[[], T]:
        assert name not in self._named, f"two steps are named {name!r}"
        self._named.add(name)
        return partial(journal.step, self._steps, name, fn)

    def track(
        self, items: Iterable[T], label: str, total: int | None = None, beside: Callable[[], str] = str
    ) -> Iterator[T]:
        count = len(items) if total is None and isinstance(items, Sized) else total
        done = _before(items, count)
        self.show(label, done, count)
        for place, item in enumerate(items, start=done + 1):
            yield item
            self.show(f"{label} · {said}" if (said := beside()) else label, place, count)

    def note(self, **numbers: float | str) -> None:
        self.notes.update(numbers)

    def curve(self, name: str, value: float) -> None:
        self.curves.setdefault(name, []).append(float(value))

    def seed_for(self, *key: object) -> int:
        text = "\x1f".join([str(self.seed), *map(str, key)])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def generator(self, *key: object) -> torch_types.Generator:
        return torch.Generator().manual_seed(self.seed_for(*key))


def _before(items: object, total: int | None) -> int:
    """What was done before the first of the items, where they are range(k, total)."""
    return items.start if isinstance(items, range) and items.stop == total else 0
