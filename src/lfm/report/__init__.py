"""The page people look at: one HTML file without network, for a run or for a whole recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

REPORT = "report.html"


def page(directories: Sequence[Path], *, name: str = "") -> str:
    """The report as one HTML document, inline style and pictures included. name: what a single run is called there."""
    import jinja2

    from lfm.report import lineage, words
    from lfm.report.gather import gather

    found = gather(directories, name)
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": words.number,
        "duration": words.duration,
        "size": words.size,
        "short": words.short,
        "metric": words.metric,
        "noted": words.noted,
    }
    return environment.get_template("page.html.jinja").render(
        page=found,
        style=(here / "style.css").read_text(encoding="utf-8"),
        across=lineage.svg(found.nodes, found.edges),
        down=lineage.svg(found.nodes, found.edges, across=False),
    )


def write(directory: Path, *, name: str = "") -> Path:
    """Make report.html in a run directory or a recipe's output, and return its path."""
    path = directory / REPORT
    path.write_text(page([directory], name=name), encoding="utf-8")
    return path
