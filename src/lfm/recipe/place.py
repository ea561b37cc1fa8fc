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

    A run of another key moves out of the way; it is not lost.
    """
    if key_at(out) == key:
        return True
    if out.exists():
        old = root / REPLACED / (key_at(out) or "unknown")[:32]
        shutil.rmtree(old, ignore_errors=True)
        old.parent.mkdir(exist_ok=True)
        out.rename(old)
    earlier = root / REPLACED / key[:32]
    if key_at(earlier) != key:
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    earlier.rename(out)
    return True


def key_at(out: Path) -> str:
    """The key of the run in a directory; empty where there is none that can be read."""
    try:
        return record.read(out).key
    except LfmError:
        return ""
