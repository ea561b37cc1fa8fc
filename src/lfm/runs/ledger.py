"""The ledger: an index over run directories, kept in one file and rebuilt from them at any time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from typing import final

import msgspec

from lfm import record
from lfm.core.errors import LfmError
from lfm.core.home import home as home


@final
class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A model or finding that was seen somewhere. method: empty where it was not made by a run."""

    digest: str
    path: str
    method: str = ""
    inputs: tuple[str, ...] = ()
    key: str = ""


def entries() -> list[Entry]:
    """All entries, oldest first; lines that a crash cut short are passed over."""
    path = home() / "ledger.jsonl"
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            found.append(msgspec.json.decode(line, type=Entry))
        except (msgspec.DecodeError, msgspec.ValidationError):
            continue
    return found


def add(new: Iterable[Entry]) -> None:
    """Append entries that the ledger does not have; a home that cannot be written is no reason to fail a run."""
    known = set(entries())
    lines = b"".join(msgspec.json.encode(e) + b"\n" for e in dict.fromkeys(new) if e not in known)
    if not lines:
        return
    try:
        home().mkdir(parents=True, exist_ok=True)
        with (home() / "ledger.jsonl").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(lines)
    except OSError:
        return


def entries_of(directory: Path) -> list[Entry]:
    """What a run directory's record tells: its output, and its inputs where they lie."""
    run = record.read(directory)
    inputs = tuple(i.digest for i in run.inputs)
    made = Entry(digest=run.output.digest, path=str(directory.resolve()), method=run.id, inputs=inputs, key=run.key)
    return [made, *(Entry(digest=i.digest, path=i.path) for i in run.inputs if i.path)]


def rebuild(root: Path) -> int:
    """Write the ledger anew from every run directory under root; the number of runs found."""
    found: list[Entry] = []
    runs = 0
    for file in sorted(root.rglob(record.RUN)):
        if any(part.startswith(".") and part.endswith(".lfm") for part in file.parts):
            continue
        try:
            found += entries_of(file.parent)
            runs += 1
        except LfmError:
            continue
    home().mkdir(parents=True, exist_ok=True)
    partial = home() / f"ledger.jsonl.{os.getpid()}"
    partial.write_bytes(b"".join(msgspec.json.encode(e) + b"\n" for e in dict.fromkeys(found)))
    partial.replace(home() / "ledger.jsonl")
    return runs


def find(digest: str) -> str | None:
    """Where a model with this digest was seen last and something still lies."""
    for entry in reversed(entries()):
        if entry.digest == digest and Path(entry.path).exists():
            return entry.path
    return None


def reuse(key: str) -> Path | None:
    """A finished run of the same method, settings, inputs and seed, if one is still there."""
    for entry in reversed(entries()):
        if entry.key == key and key and (Path(entry.path) / record.RUN).exists():
            try:
                if record.read(Path(entry.path)).key == key:
                    return Path(entry.path)
            except LfmError:
                continue
    return None
