"""A run's place on disk: worked on beside its final path, under a lock, and moved there whole."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lfm.core.errors import (
    AccessError,
    ConfigError,
    CorruptError,
    DataError,
    DivergedError,
    EditError,
    MismatchError,
    OutputError,
    UnfinishedError,
    VerifyError,
)
from lfm.core.writing import writing
from lfm.runs import journal

AGAIN = (AccessError, ConfigError, CorruptError, DataError, DivergedError, EditError, MismatchError, VerifyError)
"""Errors of the inputs or settings themselves: the same run would meet them again, and others could not resume it."""

SCRATCH = "scratch"
"""Where a run puts what it can make again in no time; nobody resumes for its sake."""

LEDGER = "budget.sqlite"


def work_for(out: Path) -> Path:
    """The hidden directory beside `out` in which the run is made."""
    return out.parent / f".{out.name}.lfm"


@contextmanager
def paid(out: Path, *, limited: bool) -> Iterator[Path | None]:
    """The ledger of a run with a budget, from which an interrupted run goes on; one that never began leaves none."""
    ledger = work_for(out) / LEDGER if limited else None
    known = ledger is None or ledger.exists()
    try:
        yield ledger
    except BaseException:
        if not known and not (work_for(out) / "lock").exists():
            shutil.rmtree(work_for(out), ignore_errors=True)
        raise


@contextmanager
def claim(out: Path, key: str) -> Iterator[Path]:
    """The run's work directory, held by this process alone; what an interrupted run of the same key left is in it.

    OutputError if `out` exists, if another process is making it, if it cannot be written, or if an interrupted run with
    other settings was to become it. An error leaves nothing behind if there is nothing to resume: before the first step
    is kept, or where the inputs or settings are at fault and nothing was paid for.
    """
    if os.path.lexists(out):
        raise OutputError(f"{out} exists", fix="choose another --out, or remove it first")
    work = work_for(out)
    missing = [place for place in (out.parent, *out.parent.parents) if not place.exists()]
    if (above := next((p for p in (out.parent, *out.parent.parents) if p.exists()), None)) and not above.is_dir():
        raise OutputError(f"{out} cannot be written", why=f"{above} is a file", fix="choose a place to write to")
    with writing(f"cannot write beside {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(exist_ok=True)
        lock = (work / "lock").open("w")
    with lock, writing(f"{out} cannot be written"):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"another process is making {out}", fix="wait for it, or choose another --out") from None
        if out.exists() or not (work / "lock").exists():
            raise OutputError(f"another process has just made {out}", fix="choose another --out")
        _same_run(work, key, out)
        try:
            yield work
        except BaseException as error:
            hopeless = isinstance(error, AGAIN) and not (work / LEDGER).exists()
            if hopeless or not _worth_keeping(work):
                _remove(work, missing)
            raise


def _remove(work: Path, made: list[Path]) -> None:
    """The work directory, and those above it that it was the first in."""
    shutil.rmtree(work, ignore_errors=True)
    for place in made:
        with suppress(OSError):  # somebody else has put something there
            place.rmdir()


def abandoned(out: Path) -> bool:
    """Whether an interrupted run left its work for `out`; it is removed. What a process is at work on stays."""
    work = work_for(out)
    try:
        with (work / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(work, ignore_errors=True)
    except OSError:  # there is none, or it is held
        return False
    return True


def settle(place: Path) -> None:
    """Have all files below a directory lie on the disk."""
    for file in place.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def publish(work: Path, artefact: Path, out: Path) -> None:
    """Move the finished artefact to its place, whole, and remove what it was made in."""
    settle(artefact)
    try:
        artefact.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputError(f"{out} appeared while the run was made", fix="choose another --out") from None
        raise OutputError(f"cannot move the result to {out}", why=str(error.strerror)) from None
    shutil.rmtree(work, ignore_errors=True)


def _same_run(work: Path, key: str, out: Path) -> None:
    recorded = work / "key"
    if not recorded.exists():
        journal.put(recorded, key)
    elif recorded.read_text(encoding="utf-8") != key and _worth_keeping(work):
        raise UnfinishedError(
            f"an interrupted run with other settings or inputs was to become {out}",
            fix=f"finish it with those, choose another --out, or remove {work}",
        )
    else:
        journal.put(recorded, key)


def _worth_keeping(work: Path) -> bool:
    """Whether a resumed run would be spared anything: kept steps, training checkpoints, or paid answers."""
    kept = (path for path in work.iterdir() if path.name not in ("lock", "key", "artefact", SCRATCH))
    return any(path.is_file() or any(file.is_file() for file in path.rglob("*")) for path in kept)
