"""Progress on stderr: what is being done, how far it is, and how long it will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lfm.cli import screen

Show = Callable[[str, int, int | None], None]

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
    from rich import progress as bars

    columns = (
        bars.SpinnerColumn(finished_text="[green]✓[/]"),
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=28, complete_style="cyan", finished_style="green"),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    tasks: dict[str, bars.TaskID] = {}
    with bars.Progress(*columns, console=screen.err(), transient=False) as progress:

        def show(label: str, done: int, total: int | None) -> None:
            for other, task in tasks.items():
                if other != label and not progress.tasks[task].finished:
                    progress.update(task, total=progress.tasks[task].completed or 1, completed=10**12)
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=total)
            progress.update(tasks[label], total=total, completed=done)

        yield show
        for task in progress.tasks:
            if not task.finished:
                progress.update(task.id, total=task.completed or 1, completed=task.completed or 1)


def _lines() -> Show:
    last = ["", 0.0]

    def show(label: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if label != last[0] or now - float(last[1]) > QUIET_SECONDS:
            last[:] = [label, now]
            far = f" {done}/{total}" if total and done else ""
            sys.stderr.write(f"{label}{far}\n")

    return show
