"""Progress on stderr: what is being done, how far it is, and how long it will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, final

from lfm.cli import screen

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Show = Callable[[str, int, int | None], None]

SHOWN = 16
"""Lines of progress at once; earlier ones have scrolled by."""

QUIET_SECONDS = 10.0
"""Where stderr is no terminal, a line for each new piece of work, and again after this long."""


@contextmanager
def shown(*, quiet: bool = False) -> Iterator[Show]:
    """A function that lfm.runs calls as work advances: bars in a terminal, sparse lines in a log, nothing if quiet."""
    if quiet:
        yield lambda label, done, total: None
    elif sys.stderr.isatty():
        yield from _bars()
    else:
        yield _lines()


def _bars() -> Iterator[Show]:
    from rich.live import Live

    steps = Steps()
    with Live(steps, console=screen.err(), refresh_per_second=10):
        yield steps.show
        steps.end()


@final
class Steps:
    """The pieces of work of a run, one a line: what is done, and of what is being done how far it is."""

    def __init__(self) -> None:
        from rich.spinner import Spinner

        self.spinner = Spinner("dots", style="cyan")
        self.lines: list[list[Any]] = []  # label, began, ended, done, total, done before it began

    def show(self, label: str, done: int, total: int | None) -> None:
        if not self.lines or work_of(self.lines[-1][0]) != work_of(label):
            self.end()
            self.lines.append([label, time.monotonic(), None, 0, None, done])
        self.lines[-1][0] = label
        self.lines[-1][3:5] = [done, total]

    def end(self) -> None:
        """The last piece of work is over."""
        if self.lines and self.lines[-1][2] is None:
            self.lines[-1][2] = time.monotonic()

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        for label, began, ended, done, total, before in self.lines[-SHOWN:]:
            now = ended if ended is not None else time.monotonic()
            mark = Text("✓", "green") if ended is not None else self.spinner
            far = bar(done, total) if ended is None else Text("")
            told = left(done - before, total and total - before, now - began)
            grid.add_row(mark, Text(label, "dim" if ended is not None else ""), far, Text(told, "dim"))
        return grid


def work_of(label: str) -> str:
    """Which piece of work a label is about: it may go on, after a dot, with how it goes."""
    return label.split(" · ")[0]


def bar(done: int, total: int | None) -> RenderableType:
    """How far, where that is known."""
    from rich.progress_bar import ProgressBar

    return ProgressBar(total=total, completed=done, width=24) if total else ""


def left(done: int, total: int | None, seconds: float) -> str:
    """The time taken, and the time left where it can be told."""
    took = screen.duration(seconds)
    if not total or not done or done >= total:
        return took
    return f"{took}, {screen.duration(seconds / done * (total - done))} left"


def _lines() -> Show:
    last = ["", 0.0]

    def show(label: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if work_of(label) != last[0] or now - float(last[1]) > QUIET_SECONDS:
            work, *rest = label.split(" · ", 1)
            last[:] = [work, now]
            label = " · ".join([f"{work} {done}/{total}" if total and done else work, *rest])
            sys.stderr.write(f"{label}\n")

    return show
