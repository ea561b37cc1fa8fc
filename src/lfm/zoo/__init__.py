"""The zoo: small real models and their data, made on this machine on their first use, cached and seeded.

Discovery is by path: every module beside this one that holds `MODELS` or `DATA`, tuples of Exhibit, shows them here.
What was made lies under home()/zoo by its name and a key over all that made it, so that a changed generator makes anew.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import importlib
import os
import shutil
from difflib import get_close_matches
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import final

import msgspec

from lfm.core.errors import ModelError
from lfm.core.home import home
from lfm.core.writing import writing
from lfm.zoo.exhibit import Exhibit, Making, Show, silent

__all__ = ["Entry", "Exhibit", "data", "listing", "make", "model"]

PACKAGE = __name__


@final
class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An exhibit as `lfm zoo` lists it. path: where it lies, or will lie once made."""

    name: str
    kind: str
    summary: str
    made: bool
    path: str
    takes: str = ""


def listing() -> list[Entry]:
    """Every exhibit, models first. Makes nothing, and imports no torch."""
    return [
        Entry(
            name=e.name,
            kind=e.kind,
            summary=e.summary,
            made=_place(e.name).exists(),
            path=str(_result(e)),
            takes=e.takes,
        )
        for e, _ in sorted(_exhibits().values(), key=lambda found: found[0].kind != "model")
    ]


def model(name: str, show: Show = silent) -> Path:
    """The directory of a model, made if it is not there. ModelError for a name that is no model's."""
    return _made(name, "model", show)


def data(name: str, show: Show = silent) -> Path:
    """The file of a data set, made if it is not there. ModelError for a name that is no data set's."""
    return _made(name, "data", show)


def make(name: str, show: Show = silent) -> Path:
    """A model's directory or a data set's file, made if it is not there."""
    return _made(name, "", show)


def _made(name: str, kind: str, show: Show) -> Path:
    known = _exhibits()
    if name not in known or (kind and known[name][0].kind != kind):
        alike = [e.name for e, _ in known.values() if not kind or e.kind == kind]
        near = get_close_matches(name, alike, n=3, cutoff=0.5)
        raise ModelError(
            f"the zoo has no {kind or 'model or data'} {name!r}",
            why=f"zoo:{name} is {'data' if kind == 'model' else 'a model'}" if name in known else "",
            fix=f"did you mean {' or '.join(f'zoo:{n}' for n in near)}?" if near else "`lfm zoo` lists all",
        )
    exhibit = known[name][0]
    if not _place(name).exists():
        parts = {need: _made(need, "", show) for need in exhibit.needs}
        with writing(f"zoo:{name} cannot be made in {home() / 'zoo'}", "set LFM_HOME to a directory with room"):
            _make(exhibit, _place(name), parts, show)
    return _result(exhibit)


def _make(exhibit: Exhibit, place: Path, parts: dict[str, Path], show: Show) -> None:
    """Make it beside its place and move it there whole. Of two processes one makes it, and the other waits for that."""
    beside = place.with_name(f".{place.name}.making")
    beside.mkdir(parents=True, exist_ok=True)
    with (beside / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            show(f"another process is making {exhibit.name}", 0, None)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            out = beside / "out"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            (beside / "work").mkdir(exist_ok=True)
            try:
                exhibit.make(out, Making(beside / "work", show, parts=parts))
            except BaseException:
                if not any((beside / "work").iterdir()):  # no checkpoint to go on from
                    shutil.rmtree(beside, ignore_errors=True)
                raise
            for file in out.rglob("*"):
                if file.is_file():
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
            out.rename(place)
        shutil.rmtree(beside, ignore_errors=True)


def _result(exhibit: Exhibit) -> Path:
    """What a reference to it means: the directory of a model, the one file of data."""
    place = _place(exhibit.name)
    return place if exhibit.kind == "model" else place / f"{exhibit.name}.jsonl"


def _place(name: str) -> Path:
    return home() / "zoo" / f"{name}-{_key(name)}"


@cache
def _files() -> dict[str, Path]:
    """The zoo's modules by name."""
    files = (file for folder in __path__ for file in sorted(Path(folder).glob("*.py")))
    return {file.stem: file for file in files if not file.stem.startswith("_")}


@cache
def _exhibits() -> dict[str, tuple[Exhibit, str]]:
    """Every exhibit by name, with the module that shows it."""
    found: dict[str, tuple[Exhibit, str]] = {}
    for stem in _files():
        module = importlib.import_module(f"{PACKAGE}.{stem}")
        for exhibit in (*getattr(module, "MODELS", ()), *getattr(module, "DATA", ())):
            assert exhibit.name not in found, f"two exhibits are named {exhibit.name!r}"
            found[exhibit.name] = (exhibit, stem)
    return found


@cache
def _key(name: str) -> str:
    """sha256 over lfm's version, the sources that make it and the keys of what it needs; 12 digits of it."""
    exhibit, stem = _exhibits()[name]
    digest = hashlib.sha256(f"{name} {metadata.version('learn-from-model')}".encode())
    for source in sorted(_sources(stem)):
        digest.update(_files()[source].read_bytes())
    for need in exhibit.needs:
        digest.update(_key(need).encode())
    return digest.hexdigest()[:12]


@cache
def _sources(stem: str) -> frozenset[str]:
    """The zoo's modules that this one rests on, itself among them: those that its import statements name."""
    found, waiting = {stem}, [stem]
    while waiting:
        tree = ast.parse(_files()[waiting.pop()].read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
                names = [(node.module or "").removeprefix(f"{PACKAGE}.")]
            else:
                continue
            new = (_files().keys() & set(names)) - found
            found |= new
            waiting += new
    return frozenset(found)
