"""Run a recipe: each job once those it needs are there, unchanged ones kept, independent ones in processes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import msgspec

from lfm.core.errors import LfmError, at
from lfm.recipe import place
from lfm.recipe.expand import Job
from lfm.recipe.job import Asked, work
from lfm.recipe.parse import Recipe, line_of
from lfm.report.gather import RECIPE, Part, Whole

Show = Callable[[str, str, int, int | None], None]
"""(job, label, done, total): called as a job advances; label "done", "kept" or "failed" once at its end."""

_events: Any = None  # of a worker process: where its progress goes


def silent(job: str, label: str, done: int, total: int | None) -> None:
    """Shows nothing."""


def run(
    recipe: Recipe, jobs: Sequence[Job], out: Path, *, workers: int = 1, show: Show = silent, command: str = ""
) -> Whole:
    """Make every job's run directory below `out`; recipe.json tells how far it is, whenever it is read.

    The first error stops what has not begun, waits for what has, and is raised. Run again, it goes on from there.
    workers: processes at once; with 1 the jobs run in this one.
    """
    began = time.time()
    with place.claim(out):
        whole = _opening(recipe, jobs, command)
        status = {job.name: "waiting" for job in jobs}
        errors: dict[str, str] = {}

        def tell(name: str, state: str, error: str = "") -> None:
            status[name] = state
            errors[name] = error
            show(name, state, 1, 1)
            _write(whole, status, errors, out, time.time() - began)

        _write(whole, status, errors, out, 0.0)
        folders = {job.name: (out / job.folder).absolute() for job in jobs}
        near = Path(recipe.path).absolute().parent
        asked = [
            Asked(job, out.absolute(), folders, near, at(recipe.path, line_of(recipe.lines, job.trail))) for job in jobs
        ]
        if workers == 1:
            _one_by_one(asked, show, tell)
        else:
            _side_by_side(asked, workers, show, tell)
        return _write(whole, status, errors, out, time.time() - began)


def _one_by_one(asked: Sequence[Asked], show: Show, tell: Callable[..., None]) -> None:
    for each in asked:
        tell(each.job.name, "running")
        try:
            tell(each.job.name, work(each, partial(show, each.job.name)))
        except LfmError as error:
            tell(each.job.name, "failed", error.what)
            raise _placed(each, error) from error
        except BaseException as error:
            tell(each.job.name, "stopped", type(error).__name__)
            raise


def _side_by_side(asked: Sequence[Asked], workers: int, show: Show, tell: Callable[..., None]) -> None:
    waiting = {each.job.name: each for each in asked}
    finished: set[str] = set()
    running: dict[Future[str], Asked] = {}
    first: Exception | None = None
    with _pool(workers, show) as pool:
        while running or (waiting and first is None):
            for name, each in list(waiting.items()):
                if first is None and len(running) < workers and finished.issuperset(each.job.needs):
                    running[pool.submit(_in_worker, waiting.pop(name))] = each
                    tell(name, "running")
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                each = running.pop(future)
                try:
                    tell(each.job.name, future.result())
                    finished.add(each.job.name)
                except LfmError as error:
                    tell(each.job.name, "failed", error.what)
                    first = first or _placed(each, error)
                except BrokenProcessPool:
                    tell(each.job.name, "failed", "its process was killed")
                    first = first or LfmError(
                        f"{each.place}: the process of step {each.job.name!r} was killed",
                        why="most often for want of memory",
                        fix="run it again with -j 1: what is done is kept",
                    )
                except Exception as error:
                    tell(each.job.name, "failed", f"{type(error).__name__}: {error}")
                    first = first or error
    if first is not None:
        raise first


def _placed(asked: Asked, error: LfmError) -> LfmError:
    """The error with the step that met it; its class, and so its exit code, stays."""
    what = error.what if error.what.startswith(asked.place) else f"{asked.place}: step {asked.job.name!r}: {error.what}"
    return type(error)(what, why=error.why, fix=error.fix)


@contextmanager
def _pool(workers: int, show: Show) -> Iterator[ProcessPoolExecutor]:
    """Worker processes, started afresh (not forked), whose progress reaches `show` in this process."""
    context = get_context("spawn")
    events = context.Queue()
    threads = max(1, (os.cpu_count() or 1) // workers)

    def relay() -> None:
        while (event := events.get()) is not None:
            show(*event)

    relaying = threading.Thread(target=relay, daemon=True)
    relaying.start()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(events, threads))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        events.put(None)
        relaying.join(timeout=5)


def _start(events: Any, threads: int) -> None:
    global _events
    _events = events
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose recipe was killed would go on holding its step, and the same command could not resume it."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _in_worker(asked: Asked) -> str:
    def show(label: str, done: int, total: int | None) -> None:
        _events.put((asked.job.name, label, done, total))

    return work(asked, show)


def _opening(recipe: Recipe, jobs: Sequence[Job], command: str) -> Whole:
    parts = tuple(
        Part(
            name=job.name,
            step=job.step,
            folder=job.folder,
            method=job.method,
            about=job.about,
            needs=job.needs,
            status="waiting",
        )
        for job in jobs
    )
    return Whole(
        name=recipe.document.name,
        about=recipe.document.about,
        path=recipe.path,
        command=command,
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        parts=parts,
    )


def _write(whole: Whole, status: Mapping[str, str], errors: Mapping[str, str], out: Path, seconds: float) -> Whole:
    """recipe.json, by rename."""
    parts = tuple(
        msgspec.structs.replace(part, status=status[part.name], error=errors.get(part.name, "")) for part in whole.parts
    )
    now = msgspec.structs.replace(whole, parts=parts, seconds=round(seconds, 3))
    partial_file = out / f"{RECIPE}.partial"
    partial_file.write_bytes(msgspec.json.format(msgspec.json.encode(now), indent=1) + b"\n")
    partial_file.replace(out / RECIPE)
    return now
