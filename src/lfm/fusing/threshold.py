"""Exact thresholds on what a formula gives, without a sort: histograms over the bits of its magnitudes."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
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

    Exact, by two passes; the second counts only what shares the first's high bits. Beyond the last element: 0.0.
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
    if not ranks or not sum(task.size for task in tasks):
        return [0.0] * len(ranks)
    high = _counts(tasks, -1, workers)
    total, found = int(high.sum()), []
    lows: dict[int, Any] = {}
    for rank in ranks:
        if rank > total:
            found.append(0.0)
            continue
        bin_, left = locate(high, max(1, rank))
        if bin_ not in lows:
            lows[bin_] = _counts(tasks, bin_, workers)
        digit, _ = locate(lows[bin_], left)
        found.append(float(np.array([bin_ << kernel.LOW | digit], dtype=np.uint32).view(np.float32)[0]))
    return found


def locate(counts: Any, rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th element from the top, and that element's rank within the bin."""
    from_top = np.cumsum(counts[::-1])
    down = int(np.searchsorted(from_top, rank))
    return len(counts) - 1 - down, rank - (int(from_top[down - 1]) if down else 0)


def _counts(tasks: Sequence[Task], prefix: int, workers: int | None) -> Any:
    run = kernel.count_kernel(tasks[0].formula, tasks[0].models)
    bins = 1 << (kernel.HIGH if prefix < 0 else kernel.LOW)
    tallies: dict[int, Any] = {}
    pieces = [(task, *span) for task in tasks for span in spans(task.size)]

    def part(piece: tuple[Task, int, int]) -> None:
        me = threading.get_ident()
        if me not in tallies:  # one a thread: clearing and adding one for each chunk would cost as much as counting
            tallies[me] = np.zeros(1 << kernel.LOW, dtype=np.int64)
        task, start, stop = piece
        task.run(run, tallies[me], prefix, start, stop)

    for _ in each(part, pieces, workers):
        pass
    return np.sum(list(tallies.values()), axis=0)[:bins]
