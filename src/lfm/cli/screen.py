"""What commands put on the screen: people get rich text, scripts get JSON and nothing else on stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.errors import LfmError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

ACCESS = {
    "text": "green",
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


class Amount(NamedTuple):
    """A number people can read and its unit."""

    value: str
    unit: str

    def __str__(self) -> str:
        return f"{self.value} {self.unit}"


def size(count: float) -> str:
    """Bytes as people say them, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def count(number: float) -> str:
    """A count as people say it: 950, 12.4 k, 3.1 M."""
    for unit in ("", " k", " M", " G", " T"):
        if abs(number) < 1000 or unit == " T":
            return f"{number:.0f}{unit}" if not unit or number >= 100 else f"{number:.1f}{unit}"
        number /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 1:
        return "< 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


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
