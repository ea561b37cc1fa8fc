"""Work over many chunks on every core. Reads, writes, hashes and torch's arithmetic release the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


_most: ContextVar[int | None] = ContextVar("most_threads", default=None)


def threads() -> int:
    """Cores that this process may use, or fewer where at_most says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _most.get() or cores)


@contextmanager
def at_most(count: int | None) -> Iterator[None]:
    """Inside, no more threads than these: each of them holds chunks in memory."""
    token = _most.set(count)
    try:
        yield
    finally:
        _most.reset(token)


def each(fn: Callable[[A], B], items: Iterable[A], workers: int | None = None) -> Iterator[B]:
    """fn of each item, in whatever order they finish; at most two a worker are in flight. The first error ends it."""
    workers = workers or threads()
    if workers == 1:
        yield from map(fn, items)
        return
    pool = ThreadPoolExecutor(workers)
    pending: set[Future[B]] = set()
    try:
        for item in items:
            pending.add(pool.submit(copy_context().run, fn, item))
            if len(pending) >= 2 * workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
