"""Exact thresholds on what a formula gives, without a sort: histograms over the bits of its magnitudes."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from lfm.core.heavy import np
from lfm.fusing import kernel
from lfm.fusing.engine import Rule, Task, task_of
from lfm.tensors.lazy import spans
from lfm.tensors.parallel import each

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor

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
    found = _largest(rule, groups, sources, [[each] for each in ranks], base, workers)
    return [each for (each,) in found]


def kth_largest_each(
    rule: Rule,
    groups: Sequence[Sequence[str]],
    sources: Sequence[Mapping[str, LazyTensor]],
    ranks: Sequence[Sequence[Sequence[int]]],
    *,
    base: Mapping[str, LazyTensor] | None = None,
    workers: int | None = None,
) -> list[list[list[float]]]:
    """The same for each model alone, by group, model and rank; models share the passes, which read the base once."""
    return _largest(replace(rule, apart=True), groups, sources, ranks, base, workers)


def _largest(
    rule: Rule,
    groups: Sequence[Sequence[str]],
    sources: Sequence[Mapping[str, LazyTensor]],
    ranks: Sequence[Sequence[Sequence[int]]],
    base: Mapping[str, LazyTensor] | None,
    workers: int | None,
) -> list[list[list[float]]]:
    tasks = {name: task_of(rule, name, sources, base) for group in groups for name in group}
    small = [i for i, group in enumerate(groups) if sum(tasks[n].size for n in group) < LARGE]
    found: dict[int, list[list[float]]] = {}

    def one(i: int, workers: int | None) -> tuple[int, list[list[float]]]:
        return i, _find([tasks[name] for name in groups[i]], ranks[i], workers)

    found.update(each(lambda i: one(i, 1), small, workers))
    found.update(one(i, workers) for i in range(len(groups)) if i not in found)
    return [found[i] for i in range(len(groups))]


def _find(tasks: Sequence[Task], ranks: Sequence[Sequence[int]], workers: int | None) -> list[list[float]]:
    """By result and rank."""
    total = sum(task.size for task in tasks)
    if not any(ranks) or not total:
        return [[0.0] * len(each) for each in ranks]
    pieces = [(task, *span) for task in tasks for span in spans(task.size)]
    taken: list[Any] = []

    def counted(kind: Kind, length: int, pieces: Sequence[Piece], heads: Sequence[int] = ()) -> Any:
        rooms = _count(kind, len(ranks), length, pieces, heads, workers)
        taken.extend(rooms)
        for other in rooms[1:]:
            rooms[0] += other
        return rooms[0].reshape(len(ranks), length)

    @cache
    def near(lowest: tuple[int, ...]) -> Any:
        return counted(kernel.near_kernel, kernel.NEAR, pieces, lowest)[:, 1:]

    @cache
    def high() -> Any:
        return counted(kernel.count_kernel, 1 << kernel.HIGH, pieces)

    sample = _sample(pieces)
    some = counted(kernel.count_kernel, 1 << kernel.HIGH, sample)
    share = sum(stop - start for _, start, stop in sample) / total

    def values(asked: Sequence[int]) -> list[float]:
        """One rank of each result; where it is 0 nothing is asked."""
        lowest = [_around(mine, max(1, round(k * share))) for mine, k in zip(some, asked, strict=True)]
        counts = near(tuple(lowest))
        missed = [k and not 0 < k - c[0] <= c[1:].sum() for c, k in zip(counts, asked, strict=True)]
        if any(missed):
            told = zip(lowest, high(), asked, missed, strict=True)
            lowest = [_window(locate(c, k)[0] << kernel.LOW) if miss else bits for bits, c, k, miss in told]
            counts = near(tuple(lowest))
        last = zip(lowest, counts, asked, strict=True)
        return [_number(bits + locate(c[1:], k - int(c[0]))[0]) if k else 0.0 for bits, c, k in last]

    found: list[list[float]] = [[] for _ in ranks]
    for place in range(max(map(len, ranks))):
        asked = [mine[place] if place < len(mine) else 0 for mine in ranks]
        told = values([max(1, k) if k <= total else 0 for k in asked])
        for mine, wanted, value in zip(found, ranks, told, strict=True):
            mine += [value] * (place < len(wanted))
    for room in taken:
        _rooms[len(room)].append(room)
    return found


def _number(bits: int) -> float:
    """The fp32 that has these bits."""
    return float(np.array([bits], dtype=np.uint32).view(np.float32)[0])


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


def _count(
    kind: Kind, results: int, length: int, pieces: Sequence[Piece], heads: Sequence[int], workers: int | None
) -> list[Any]:
    """What each thread counts with this kind of kernel in its pieces, int64 (results · length). heads: what stands
    before each result's; of the first thread's alone it is left there."""
    counts: dict[int, Any] = {}

    def part(piece: Piece) -> None:
        task, start, stop = piece
        me = threading.get_ident()
        if me not in counts:
            counts[me] = _room(results * length)
            counts[me][: len(heads) * length : length] = heads
        task.run(kind(task.formula, task.models), counts[me], -1, start, stop)

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
