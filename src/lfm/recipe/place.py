"""A recipe's output directory: one run directory a job, recipe.json, and what was replaced."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lfm import record
from lfm.core.errors import LfmError, OutputError
from lfm.report.gather import RECIPE
from lfm.runs.directory import work_for

REPLACED = ".replaced"
"""Below a recipe's output: runs whose settings or inputs have changed since, by key. They come back if those do."""


@contextmanager
def claim(out: Path) -> Iterator[Path]:
    """The output directory, held by this process alone. OutputError if it is another's, or not a recipe's."""
    if out.exists() and not (out / RECIPE).exists() and any(f.name != ".lock" for f in out.iterdir()):
        raise OutputError(f"{out} exists and is not a recipe's output", fix="choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise OutputError(f"cannot write {out}", why=str(error.strerror)) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"another process is making {out}", fix="wait for it, or choose another --out") from None
        yield out


def kept(root: Path, out: Path, key: str) -> bool:
    """Whether `out` holds the run of this key, brought back from among the replaced if need be.

    A run of another key moves out of the way, finished or interrupted; neither is lost.
    """
    if key_at(out) == key:
        return True
    work = work_for(out)
    for place, was in ((out, key_at(out) or "unknown"), (work, _interrupted(work))):
        if place.exists() and was != key:
            _move(place, _replaced(root, place, out, was))
    earlier, begun = (_replaced(root, place, out, key) for place in (out, work))
    if begun.exists() and not work.exists():
        _move(begun, work)
    if key_at(earlier) != key:
        return False
    _move(earlier, out)
    return True


def _replaced(root: Path, place: Path, out: Path, key: str) -> Path:
    return root / REPLACED / (key[:32] if place == out else f"{key[:32]}.begun")


def _move(place: Path, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    to.parent.mkdir(parents=True, exist_ok=True)
    place.rename(to)


def _interrupted(work: Path) -> str:
    """The key of the run that was being made in a work directory."""
    recorded = work / "key"
    return recorded.read_text(encoding="utf-8") if recorded.is_file() else "unknown"


def key_at(out: Path) -> str:
    """The key of the run in a directory; empty where there is none that can be read."""
    try:
        return record.read(out).key
    except LfmError:
        return ""
