"""An exhibit of the zoo: a model or a data set that a function makes, and what that function is handed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, final

from lfm.core.heavy import torch

if TYPE_CHECKING:
    import torch as torch_types

    from lfm.data.records import Record

T = TypeVar("T")

Show = Callable[[str, int, int | None], None]
"""(label, done, total): called as work advances; total None where it is not known."""


def silent(label: str, done: int, total: int | None) -> None:
    """Shows nothing."""


@final
@dataclass(frozen=True)
class Exhibit:
    """What the zoo can make. make: fill the empty directory. needs: other exhibits, made first.

    takes: how long making it takes, as users read it; empty where it is no time.
    """

    name: str
    summary: str
    make: Callable[[Path, Making], None]
    kind: Literal["model", "data"] = "model"
    needs: tuple[str, ...] = ()
    takes: str = ""


@final
@dataclass(frozen=True)
class Making:
    """What `make` is handed: a Run (for lfm.train) in a directory that outlives a kill, and where its needs lie."""

    work: Path
    show: Show = silent
    seed: int = 0
    parts: Mapping[str, Path] = field(default_factory=dict)

    def step(self, name: str, fn: Callable[[], T]) -> T:
        return fn()

    def once(self, name: str, fn: Callable[[], T]) -> T:
        return fn()

    def track(
        self, items: Iterable[T], label: str, total: int | None = None, beside: Callable[[], str] = str
    ) -> Iterator[T]:
        count = len(items) if total is None and isinstance(items, Sized) else total
        self.show(label, 0, count)
        for done, item in enumerate(items, start=1):
            yield item
            self.show(label, done, count)

    def note(self, **numbers: float | str) -> None:
        """Notes and curves are a run's; the zoo keeps none."""

    def curve(self, name: str, value: float) -> None:
        """See note."""

    def seed_for(self, *key: object) -> int:
        text = "\x1f".join([str(self.seed), *map(str, key)])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def generator(self, *key: object) -> torch_types.Generator:
        return torch.Generator().manual_seed(self.seed_for(*key))


def records(name: str, summary: str, make: Callable[[], Sequence[Record]]) -> Exhibit:
    """The exhibit that is a file of records, NAME.jsonl."""

    def written(out: Path, making: Making) -> None:
        from lfm.data import files

        files.write(make(), out / f"{name}.jsonl")

    return Exhibit(name, summary, written, kind="data")


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread: for small models it is no slower, and sums do not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
