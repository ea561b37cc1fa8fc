"""One run by several processes: the leader makes the directory; the others follow it, and end as it ends.

torchrun or `accelerate launch` started them (lfm.core.launched). All run the method; what they say to each other beside
`fit`'s gradients are a few words through the launcher's store. When one fails, the launcher ends the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lfm.core import errors, launched
from lfm.core.errors import ConfigError, LfmError

if TYPE_CHECKING:
    from lfm.record import RunRecord

T = TypeVar("T")

PARTING = timedelta(seconds=10)
"""How long the reason is waited for when another process has gone."""

_runs = count()
_now = ""


def lead(make: Callable[[], RunRecord]) -> RunRecord:
    """Make the run, and tell the others how it ended."""
    _next()
    try:
        done = make()
    except BaseException as error:
        for key in ("go", "done"):
            _tell(key, _failed(error))
        raise
    _tell("done", {})
    return done


def follow(method: Callable[[Path], object], done: Callable[[], RunRecord]) -> RunRecord:
    """Run the method when the leader does, in the leader's work directory; then what it has made, or its error."""
    _next()
    work = Path(_told("go")["work"])
    try:
        method(work)
    except Exception as error:
        _tell(f"ready/{launched.rank()}", _failed(error))
        if not isinstance(error, LfmError):  # it may be that the leader has gone; then its reason is the reason
            launched.store().set_timeout(PARTING)
            _told("done")
        raise
    _tell(f"ready/{launched.rank()}", {})
    _told("done")
    return done()


def go(work: Path) -> None:
    """The leader begins on the method, in this directory."""
    if launched.size() > 1:
        _tell("go", {"work": str(work.absolute())})


def all_ready() -> None:
    """Wait until the others are done with the method and the work directory; if one of them failed, so has the run."""
    for other in range(1, launched.size()):
        _told(f"ready/{other}")


def step(name: str, kept: bool, fn: Callable[[], T], keep: Callable[[], T]) -> T:
    """A journalled step: what the leader has kept all read; else all do it, and the leader keeps it."""
    if launched.leads():
        _tell(f"step/{name}", {"kept": kept})
        return keep()
    return keep() if _told(f"step/{name}")["kept"] else fn()


def once(name: str, keep: Callable[[], T]) -> T:
    """A journalled step that the leader does, while the others wait for what it keeps; all fail as it fails."""
    key = f"step/{name}"
    if not launched.leads():
        _told(key)
        return keep()
    try:
        done = keep()
    except BaseException as error:
        _tell(key, _failed(error))
        raise
    _tell(key, {"kept": True})
    return done


def alone(what: str) -> None:
    """ConfigError where several processes were launched for what one does."""
    if launched.size() > 1:
        raise ConfigError(
            f"{what} is for one process, and {launched.size()} were launched",
            fix="launch `lfm run METHOD …` with several, and the rest without",
        )


def _next() -> None:
    global _now
    _now = f"run/{next(_runs)}"


def _tell(key: str, what: dict[str, Any]) -> None:
    launched.store().set(f"{_now}/{key}", json.dumps(what))


def _told(key: str) -> dict[str, Any]:
    try:
        said = json.loads(launched.store().get(f"{_now}/{key}"))
    except Exception as error:  # the store's own errors have no type of their own
        raise RuntimeError(f"the other processes are gone ({str(error).splitlines()[0]})") from None
    if "error" in said:
        kind = getattr(errors, said["error"], None)
        if kind is None:
            raise RuntimeError(said["what"])
        raise kind(said["what"], why=said["why"], fix=said["fix"])
    return said


def _failed(error: BaseException) -> dict[str, Any]:
    if isinstance(error, LfmError):
        known = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        return {"error": known, "what": error.what, "why": error.why, "fix": error.fix}
    return {"error": "", "what": f"{type(error).__name__}: {error}"}
