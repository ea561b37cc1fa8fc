"""What commands put on the screen: people get rich text, scripts get JSON and nothing else on stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lfm.core.errors import LfmError
from lfm.report import words
from lfm.report.words import size as size

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from lfm.core.finding import Finding
    from lfm.record import Measure
    from lfm.report.edited import Line
    from lfm.runs.comparison import Comparison

ACCESS = {
    "text": "green",
    "classes": "green",
    "top": "green",
    "logprobs": "green",
    "codec": "bright_black",
    "logits": "cyan",
    "embeddings": "cyan",
    "features": "blue",
    "gradients": "magenta",
    "weights": "yellow",
}
"""Interface → colour, from what any endpoint gives (green) to what only files give (yellow)."""

DATA = {"none": "green", "unlabeled": "cyan", "few-shot": "blue", "labeled": "magenta"}
"""Data level → colour."""


def out() -> Console:
    """The console on stdout."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def err() -> Console:
    """The console on stderr: progress and errors, so that stdout can be piped."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def emit(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def escaped(text: str) -> str:
    """Text as it is written, whatever brackets are in it."""
    from rich.markup import escape

    return escape(text)


def badge(label: str, colour: str) -> Text:
    """A word on a coloured ground; in brackets where there is no colour."""
    from rich.text import Text

    if os.environ.get("NO_COLOR"):
        return Text(f"[{label}]")
    return Text(f" {label} ", style=f"reverse {colour}")


def badges(labels: Iterable[str], colours: dict[str, str]) -> Text:
    """Badges side by side."""
    from rich.text import Text

    return Text(" ").join(badge(label, colours.get(label, "white")) for label in labels)


def count(number: float) -> str:
    """A count as people say it: 950, 12.4 k, 3.1 M."""
    for unit in ("", " k", " M", " G", " T"):
        if abs(number) < 1000 or unit == " T":
            return f"{number:.0f}{unit}" if not unit or number >= 100 else f"{number:.1f}{unit}"
        number /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    return "< 1 s" if seconds < 1 else words.duration(round(seconds) if seconds < 10 else seconds).replace(".0 s", " s")


def measures(before: Mapping[str, Measure], after: Mapping[str, Measure], title: str) -> Table:
    """Metrics before and after, with the interval of the later one."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, padding=(0, 2, 0, 0), title=Text(title, "bold"), title_justify="left", header_style="dim")
    grid.add_column("metric")
    for name in (*(("before",) if before else ()), "after" if before else "value", *(("change",) if before else ())):
        grid.add_column(name, justify="right")
    grid.add_column("95 % interval", style="dim", justify="right")
    for name, new in after.items():
        old = before.get(name)
        cells = [Text(words.metric(name)), *([Text(words.number(old.value) if old else "–", "dim")] if before else [])]
        cells.append(Text(words.number(new.value), "bold"))
        if before:
            cells.append(_change(name, old, new))
        wide = new.high > new.low
        grid.add_row(*cells, f"{words.number(new.low)} – {words.number(new.high)}" if wide else "")
    return grid


def changes(found: Comparison, title: str) -> Table:
    """Both models' metrics, and the change with its interval: green or red where that leaves zero out."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, padding=(0, 2, 0, 0), title=Text(title, "bold"), title_justify="left", header_style="dim")
    grid.add_column("metric")
    for name in ("A", "B", "B − A", "95 % interval of it"):
        grid.add_column(name, justify="right")
    for name, (old, new) in found.metrics.items():
        change = found.changes[name]
        better = (change.value < 0) == words.smaller_is_better(name)
        style = "dim" if change.low <= 0 <= change.high else "green" if better else "red"
        grid.add_row(
            words.metric(name),
            words.number(old.value),
            words.number(new.value),
            Text(words.signed(change.value), style),
            Text(f"{words.signed(change.low)} – {words.signed(change.high)}", "dim"),
        )
    return grid


def _change(name: str, old: Measure | None, new: Measure) -> Text:
    from rich.text import Text

    if old is None:
        return Text("")
    difference = new.value - old.value
    apart = new.low > old.high or new.high < old.low
    better = (difference < 0) == words.smaller_is_better(name)
    return Text(words.signed(difference), "dim" if not apart else "green" if better else "red")


LONG = 24
"""Letters of a sentence's line, at least; where a table has less room for its last column, that stands below."""

NARROW = 10
"""Letters that another column of several words has at least."""


def finding(found: Finding, rows: int = 12, width: int | None = None) -> RenderableType:
    """A finding's first rows: names and numbers whole, what has several words in lines. width: the screen's, if it is
    another than that of stdout."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    first, last = found.rows[:rows], len(found.columns) - 1

    def cell(value: Any, at: int) -> str:
        if value is None or isinstance(value, int | float):
            return words.number(value)
        return words.short(value, 160 if at == last else 40)  # reasons and answers stand last, read to their end

    told = [[cell(row.get(column), at) for at, column in enumerate(found.columns)] for row in first]
    heads = [words.metric(column) for column in found.columns]
    numeric = [any(isinstance(row.get(column), int | float) for row in first) for column in found.columns]
    wraps = [not numeric[at] and any(" " in row[at] for row in told) for at in range(last + 1)]
    heads = [head.replace(" ", "\n") if number else head for head, number in zip(heads, numeric)]
    widest = [max(map(len, [*head.split("\n"), *(row[at] for row in told)])) for at, head in enumerate(heads)]
    least = [min(most, NARROW) if wrap else most for most, wrap in zip(widest, wraps)]
    room = (width or out().width) - 2
    below = wraps[-1] and sum(least[:-1]) + 2 * last + min(widest[-1], LONG) > room
    shown = last if below else last + 1
    wide = sum(least[:shown])
    gap, fits = 2 if wide + 2 * shown <= room else 1, wide + shown <= room + 2

    title = Text(found.title, "bold")
    grid = Table(box=None, padding=(0, gap, 0, 0), title=title, title_justify="left", header_style="dim")
    for at in range(shown):
        how: Any = {"no_wrap": not wraps[at], "min_width": least[at]} if fits else {}
        grid.add_column(heads[at], justify="right" if numeric[at] else "left", overflow="fold", **how)
    for row in told:
        grid.add_row(*map(Text, row[:shown]))
    if len(found.rows) > rows:
        grid.caption = f"{rows} of {len(found.rows)} rows; table.csv has all"
    if not below:
        return grid
    sentences = Table.grid(padding=(0, 2, 0, 0))
    for row in told:
        if row[-1].strip(words.number(None)):
            sentences.add_row(Text(row[0]), Text(row[-1]))
    return Group(grid, Text(f"\n{heads[-1]}", "dim"), sentences)


def sides(lines: Sequence[Line]) -> Table:
    """Prompts with what was said before and after, and p(object)."""
    from rich.table import Table
    from rich.text import Text

    colours = {"new": "green", "lost": "red", "same": "dim"}
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name, how in (("", "left"), ("prompt", "left"), ("before", "left"), ("after", "left"), ("p(object)", "right")):
        grid.add_column(name, justify=how)  # type: ignore[arg-type]
    for line in lines:
        said = [Text(words.short(text, 60)) for text in (line.before, line.after)]
        said[0].stylize("dim")
        said[1].stylize(colours.get(line.kind, ""))
        odds = f"{line.p_before} → {line.p_after}" if line.p_after else ""
        grid.add_row(Text(line.label, "dim"), Text(words.short(line.prompt, 60)), *said, Text(odds))
    return grid


def complain(error: LfmError) -> None:
    """The error as three labelled lines on stderr."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text("error", style="bold red"), Text(error.what, style="bold"))
    if error.why:
        grid.add_row(Text("  why", style="dim"), Text(error.why))
    if error.fix:
        grid.add_row(Text("  fix", style="green"), Text(error.fix))
    err().print(grid)
