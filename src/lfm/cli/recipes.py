"""`lfm plan` and `lfm run` of a recipe, and its schema."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import typer

from lfm.cli import progress, screen
from lfm.cli.orders import default_out
from lfm.core.errors import LfmError

if TYPE_CHECKING:
    from rich.table import Table

    from lfm.recipe import Job
    from lfm.recipe.run import Show
    from lfm.report.gather import Whole

MARKS = {"done": ("✓", "green"), "kept": ("=", "green"), "failed": ("✗", "red"), "stopped": ("✗", "red")}
"""How a job that has ended is marked."""


def plan(target: str, overrides: Mapping[str, Any], out: Path | None, seed: int | None, json: bool) -> None:
    """What would the recipe take, step by step?"""
    from lfm import recipe as recipes
    from lfm.cli.work import DOES_NOT_FIT, plan_facts
    from lfm.recipe import plan as planning

    recipe = recipes.read(target)
    jobs = recipes.expand(recipe, overrides, seed=seed)
    plans = planning.plan(recipe, jobs, out or default_out(_stem(target)))
    whole = planning.total(plans)
    if json:
        screen.emit({"name": recipe.document.name, **whole, "steps": {n: plan_facts(p) for n, p in plans.items()}})
    else:
        _show_plan(recipe.document.name, jobs, plans, whole)
    if whole["lacks"]:
        raise typer.Exit(DOES_NOT_FIT)


def run(
    target: str, overrides: Mapping[str, Any], out: Path | None, seed: int | None, workers: int, json: bool
) -> Path:
    """Run the recipe and write its page; the page's path."""
    from lfm import recipe as recipes
    from lfm import report
    from lfm.recipe import run as running

    recipe = recipes.read(target)
    jobs = recipes.expand(recipe, overrides, seed=seed)
    place = out or default_out(_stem(target))
    again = _command(target, overrides, place, seed)
    try:
        with _progress(recipe.document.name, jobs, place, quiet=json) as show:
            whole = running.run(recipe, jobs, place, workers=workers, show=show, command=again)
    except KeyboardInterrupt:
        screen.err().print(f"\n[bold]stopped.[/] The same command goes on from there:\n  {again}", soft_wrap=True)
        raise typer.Exit(130) from None
    page = report.write(place)
    if json:
        import msgspec

        screen.emit(msgspec.to_builtins(whole) | {"out": str(place), "report": str(page)})
    else:
        _show_done(whole, page)
    return page


def schema() -> None:
    """The JSON Schema of recipes, for editors: complete and check YAML while it is written."""
    from lfm.recipe.schema import schema as make

    screen.emit(make())


def _stem(target: str) -> str:
    return Path(target).stem


def _command(target: str, overrides: Mapping[str, Any], out: Path, seed: int | None) -> str:
    words = ["lfm", "run", target]
    for key, value in overrides.items():
        words += ["--set", f"{key}={value}"]
    words += [f"--seed={seed}"] if seed is not None else []
    return shlex.join([*words, "--out", str(out)])


def _show_plan(name: str, jobs: Sequence[Job], plans: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_footer=True, footer_style="bold")
    low, high = whole["seconds"]
    table.add_column("step", "together")
    table.add_column("method")
    table.add_column("time", f"{screen.duration(low)} – {screen.duration(high)}", justify="right")
    table.add_column("memory", screen.size(whole["memory"]), justify="right")
    table.add_column("disk", screen.size(whole["disk"]), justify="right")
    table.add_column("queries", screen.count(whole["queries"]) if whole["queries"] else "", justify="right")
    for job in jobs:
        found = plans[job.name]
        low, high = found.seconds
        table.add_row(
            Text(job.name, "bold"),
            Text(job.method, "cyan"),
            f"{screen.duration(low)} – {screen.duration(high)}",
            screen.size(found.memory),
            screen.size(found.disk),
            screen.count(found.queries) if found.queries else "",
        )
    console = screen.out()
    console.print(Text.assemble("\n  ", (name, "bold")))
    console.print(Padding(table, (1, 2)))
    if not whole["lacks"]:
        console.print("  [green]✓[/] it fits on this machine\n")
    for lack in whole["lacks"]:
        console.print(Text.assemble("  ", ("✗ would not fit: ", "red"), lack), soft_wrap=True)


def _show_done(whole: Whole, page: Path) -> None:
    from rich.text import Text

    made = sum(part.status == "done" for part in whole.parts)
    kept = sum(part.status == "kept" for part in whole.parts)
    told = f"{made} step{'s' if made != 1 else ''} made" + (f", {kept} kept unchanged" if kept else "")
    console = screen.out()
    console.print(Text.assemble("\n  ", ("✓ ", "green"), f"{told} in {screen.duration(whole.seconds)}"))
    console.print("  [dim]the page that tells it[/]")
    console.print(Text(f"{page.resolve()}", style="bold"), soft_wrap=True)


@contextmanager
def _progress(name: str, jobs: Sequence[Job], out: Path, *, quiet: bool) -> Iterator[Show]:
    """Every job on one line, with what it is doing; sparse lines where stderr is no terminal."""
    if quiet:
        yield lambda job, label, done, total: None
    elif not sys.stderr.isatty():
        yield _lines()
    else:
        from rich.live import Live

        board = Board(name, jobs, out)
        with Live(board, console=screen.err(), refresh_per_second=8):
            yield board.show


def _lines() -> Show:
    last: dict[str, str] = {}

    def show(job: str, label: str, done: int, total: int | None) -> None:
        if last.get(job) != label and last.get(job) not in MARKS:
            last[job] = label
            sys.stderr.write(f"{job}: {label}\n")

    return show


@final
class Board:
    """The jobs of a recipe as they go, and what each changed; drawn anew whenever rich asks."""

    def __init__(self, name: str, jobs: Sequence[Job], out: Path) -> None:
        from rich.spinner import Spinner

        self.name, self.jobs, self.out, self.began = name, jobs, out, time.monotonic()
        self.now: dict[str, tuple[str, int, int | None]] = {}
        self.spans: dict[str, list[float]] = {}
        self.told: dict[str, str] = {}
        self.spinner = Spinner("dots", style="cyan")

    def show(self, job: str, label: str, done: int, total: int | None) -> None:
        if self.now.get(job, ("",))[0] in MARKS:
            return  # a worker's last event may come after its end
        self.now[job] = (label, done, None if label == "running" else total)
        span = self.spans.setdefault(job, [time.monotonic(), 0.0])
        span[1] = time.monotonic()
        if label in ("done", "kept"):
            folder = next(each.folder for each in self.jobs if each.name == job)
            self.told[job] = _gist(self.out / folder)

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=1)
        for _ in range(4):
            grid.add_column(no_wrap=True)
        grid.add_row("", Text(self.name, "bold"), "", "", Text(screen.duration(time.monotonic() - self.began), "dim"))
        for job in self.jobs:
            label, done, total = self.now.get(job.name, ("", 0, None))
            ended = label in MARKS
            mark = Text(*MARKS[label]) if ended else self.spinner if label else Text("·", "dim")
            said = Text(self.told.get(job.name, ""), "green") if ended else Text(label, "dim")
            if label == "kept":
                said.append("  unchanged", style="dim")
            began, until = self.spans.get(job.name, (0.0, 0.0))
            took = (until if ended else time.monotonic()) - began if label else 0.0
            name = Text(job.name, "bold" if label else "dim")
            grid.add_row(mark, name, Text(job.method, "dim"), said, Text(screen.duration(took) if label else "", "dim"))
            if label and not ended and total:
                grid.add_row("", "", "", progress.bar(done, total), Text(progress.left(done, total, took), "dim"))
        return grid


def _gist(folder: Path) -> str:
    """What a finished run changed, in a few words."""
    from lfm import record
    from lfm.report.measured import gist

    try:
        return gist(record.read(folder))
    except LfmError:
        return ""


def register(app: typer.Typer) -> None:
    app.command("recipe-schema", rich_help_panel="Make")(schema)
