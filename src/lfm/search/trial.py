"""A run inside a run: what a method that is only being tried gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, final

from lfm.core.method import Run

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Trial:
    """A Run that shows nothing and keeps nothing on disk: its steps are computed each time, whatever others are called.

    Its randomness is the run's own, the same in every trial, so that they differ by their settings alone. What a trial
    comes to is for the run to keep: as one step, under a name of the trial's own. What it notes is in `notes`.
    """

    of: Run
    name: str
    notes: dict[str, float | str] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return self.of.seed

    @property
    def work(self) -> Path:
        return self.of.work / "trials" / self.name

    def step(self, name: str, fn: Callable[[], T]) -> T:
        return fn()

    def once(self, name: str, fn: Callable[[], T]) -> T:
        return fn()

    def track(
        self, items: Iterable[T], label: str, total: int | None = None, beside: Callable[[], str] = str
    ) -> Iterator[T]:
        return iter(items)

    def note(self, **numbers: float | str) -> None:
        self.notes.update(numbers)

    def curve(self, name: str, value: float) -> None:
        """Not kept."""

    def seed_for(self, *key: object) -> int:
        return self.of.seed_for(*key)

    def generator(self, *key: object) -> torch.Generator:
        return self.of.generator(*key)
