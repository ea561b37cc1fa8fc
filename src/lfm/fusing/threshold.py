"""Exact thresholds on what a formula gives, without a sort: histograms over the bits of its magnitudes."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from lfm.core.heavy import np
from lfm.fusing import kernel
from lfm.fusing.engine import Rule, Task, task_of
from lfm.tensors.lazy import spans
from lfm.tensors.parallel import each

if TYPE_CHECKING:
    from lfm.core.model import LazyTensor

LARGE = 1 << 22
"""Elements from which on a tensor's chunks are shared out over the cores, and not whole tensors."""

SAMPLE, RUNS = 1 << 16, 8
"""Elements that say where a threshold will be, and in how many runs at most."""

ROW = 256
"""Counts that are added up before one of them is looked for."""

Piece = tuple[Task, int, int]
"""A tensor's elements start to stop."""

Kind = Callable[[kernel.Formula, int], Callable[..., None]]
"""One of the kernels that count."""


def kth_largest(
    rule: Rule,
    groups: Sequence[Sequence[str]],
    sources: Sequence[Mapping[str, LazyTensor]],
    ranks: Sequence[Sequence[int]],
    *,
    base: Mapping[str, LazyTensor] | None = None,
    workers: int | None = None,
) -> list[list[float]]:
    """For each group of tensors taken together, the k-th largest |result| in fp32, for each k of its ranks (from 1).

    Exact: a sample says between which bits the threshold will be, and one pass for each rank counts how many are beyond
    them and how many have each of them. Where the threshold is not among them, a pass that counts all by their high
    digit says where it is. Beyond the last element: 0.0.
    """
    tasks = {name: task_of(rule, name, sources, base) for group in groups for name in group}
    small = [i for i, group in enumerate(groups) if sum(tasks[n].size for n in group) < LARGE]
    found: dict[int, list[float]] = {}

    def one(i: int, workers: int | None) -> tuple[int, list[float]]:
        return i, _find([tasks[name] for name in groups[i]], ranks[i], workers)

    found.update(each(lambda i: one(i, 1), small, workers))
    found.update(one(i, workers) for i in range(len(groups)) if i not in found)
    return [found[i] for i in range(len(groups))]


def _find(tasks: Sequence[Task], ranks: Sequence[int], workers: int | None) -> list[float]:
    total = sum(task.size for task in tasks)
    if not ranks or not total:
        return [0.0] * len(ranks)
    pieces = [(task, *span) for task in tasks for span in spans(task.size)]
    taken: list[Any] = []

    def counted(kind: Kind, length: int, pieces: Sequence[Piece], lowest: int = 0) -> Any:
        rooms = _count(kind, length, pieces, lowest, workers)
        taken.extend(rooms)
        for other in rooms[1:]:
            rooms[0] += other
        return rooms[0]

    @cache
    def near(lowest: int) -> Any:
        return counted(kernel.near_kernel, kernel.NEAR, pieces, lowest)

    @cache
    def high() -> Any:
        return counted(kernel.count_kernel, 1 << kernel.HIGH, pieces)

    sample = _sample(pieces)
    some = counted(kernel.count_kernel, 1 << kernel.HIGH, sample)
    share = sum(stop - start for _, start, stop in sample) / total

    def value(rank: int) -> float:
        if rank > total:
            return 0.0
        lowest = _around(some, max(1, round(rank * share)))
        counts = near(lowest)
        beyond = int(counts[0])
        if not 0 < rank - beyond <= counts[1:].sum():
            lowest = _window(locate(high(), rank)[0] << kernel.LOW)
            counts = near(lowest)
            beyond = int(counts[0])
        bits = lowest + locate(counts[1:], rank - beyond)[0]
        return float(np.array([bits], dtype=np.uint32).view(np.float32)[0])

    found = [value(max(1, rank)) for rank in ranks]
    for room in taken:
        _rooms[len(room)].append(room)
    return found


def _sample(pieces: Sequence[Piece]) -> list[Piece]:
    """A few runs of elements from all over."""
    some = pieces[:: -(-len(pieces) // RUNS)]
    length = SAMPLE // len(some)
    return [(task, start, min(stop, start + length)) for task, start, stop in some]


def _around(high: Any, rank: int) -> int:
    """Bits of a window's first element whose middle is about where the rank-th of these counts is."""
    bin_, left = locate(high, rank)
    return _window(int((bin_ + 1 - left / high[bin_]) * (1 << kernel.LOW)) - kernel.WINDOW // 2)


def _window(lowest: int) -> int:
    """The nearest place at which a window can begin."""
    return min(max(0, lowest), (1 << kernel.HIGH + kernel.LOW) - kernel.WINDOW)


def locate(counts: Any, rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th element from the top, and that element's rank within the bin."""
    rows = counts.reshape(-1, ROW)
    row, left = _down(rows.sum(1), rank)
    bin_, left = _down(rows[row], left)
    return row * ROW + bin_, left


def _down(counts: Any, rank: int) -> tuple[int, int]:
    from_top = np.cumsum(counts[::-1])
    down = int(np.searchsorted(from_top, rank))
    return len(counts) - 1 - down, rank - (int(from_top[down - 1]) if down else 0)


def _count(kind: Kind, length: int, pieces: Sequence[Piece], lowest: int, workers: int | None) -> list[Any]:
    """What each thread counts with this kind of kernel in its pieces, int64 (length)."""
    counts: dict[int, Any] = {}

    def part(piece: Piece) -> None:
        task, start, stop = piece
        me = threading.get_ident()
        if me not in counts:
            counts[me] = _room(length)
        task.run(kind(task.formula, task.models), counts[me], lowest, start, stop)

    for _ in each(part, pieces, workers):
        pass
    return [*counts.values()]


_rooms: defaultdict[int, list[Any]] = defaultdict(list)
"""Counts that nobody uses now. A fresh one costs the kernel's zeroing, page by page, as much as a tensor's counting."""


def _room(length: int) -> Any:
    try:
        room = _rooms[length].pop()
    except IndexError:
        return np.zeros(length, dtype=np.int64)
    room.fill(0)
    return room
