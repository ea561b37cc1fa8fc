"""Run directories → what the page shows of them, in the order in which it shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import msgspec

from lfm import record as records
from lfm.core import finding as findings
from lfm.core.errors import LfmError, ModelError
from lfm.core.finding import Finding, Map
from lfm.record import RunRecord, Sample
from lfm.report import edited, network, plots, scatter, words
from lfm.report.ancestry import ancestry
from lfm.report.lineage import Node
from lfm.report.measured import Overview, Row, Table, headline, overview, row, rows, sentence

RECIPE = "recipe.json"
"""What a recipe's output directory tells of its jobs, beside one run directory a job."""

WORDS = 48
"""Characters up to which an answer is a few words: what was said before is then struck out."""

ROWS, CURVES, SAMPLES = 12, 12, 8
"""How much of a table, of the plots and of the samples the page shows; the run directory holds all."""


@final
class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One job of a recipe. status: done, kept (unchanged since an earlier run), failed or waiting."""

    name: str
    step: str
    folder: str
    method: str
    about: str = ""
    needs: tuple[str, ...] = ()
    status: str = "done"
    error: str = ""


@final
class Whole(msgspec.Struct, frozen=True, kw_only=True):
    """recipe.json: what the recipe was and how it went."""

    name: str
    about: str = ""
    path: str = ""
    command: str = ""
    started: str = ""
    seconds: float = 0.0
    parts: tuple[Part, ...] = ()


class Figure(NamedTuple):
    """A curve or a map: its title and its SVG."""

    title: str
    svg: str


class Sampled(NamedTuple):
    """A prompt and what was said to it. kind: changed (a few words for a few others), rewritten (longer), or same."""

    prompt: str
    before: str
    after: str
    kind: str


class Chapter(NamedTuple):
    """One run as the page tells it."""

    anchor: str
    number: int
    name: str
    method: str
    title: str
    sentence: str
    record: RunRecord
    tables: list[Table]
    overview: Overview | None
    finding: Finding | None
    cells: list[list[str]]
    numeric: list[bool]
    notes: Mapping[str, float | str]
    verified: str
    figures: list[Figure]
    samples: list[Sampled]
    more_samples: int
    edited: edited.Shown | None
    settings: list[tuple[str, str]]
    status: str
    headline: Row | None


class Page(NamedTuple):
    """All that the template is given."""

    title: str
    kicker: str
    about: str
    command: str
    started: str
    seconds: float
    chapters: list[Chapter]
    unfinished: list[Part]
    nodes: list[Node]
    edges: list[tuple[str, str]]
    versions: Mapping[str, str]
    verified: str


def gather(directories: Sequence[Path], name: str = "") -> Page:
    """The page of one recipe's output, of one run directory, or of several. ModelError where there is none."""
    if len(directories) == 1 and (directories[0] / RECIPE).is_file():
        return _recipe(directories[0])
    chapters = _chapters([(d, name or d.resolve().name, "", "done") for d in directories])
    first = chapters[0].record
    single = len(chapters) == 1
    seconds = sum(c.record.seconds for c in chapters)
    command = "\n".join(c.record.command for c in chapters if c.record.command)
    kicker, title = ("A run", chapters[0].title) if single else ("Runs", f"{len(chapters)} runs")
    return _page(title, kicker, "", command, first.started, seconds, chapters, [], {})


def _recipe(directory: Path) -> Page:
    whole = whole_of(directory)
    done = [p for p in whole.parts if (directory / p.folder / records.RUN).is_file()]
    chapters = _chapters([(directory / p.folder, p.name, p.about, p.status) for p in done])
    needs = {p.name: p.needs for p in done}
    left = [p for p in whole.parts if p not in done]
    return _page(
        whole.name, "A recipe", whole.about, whole.command, whole.started, whole.seconds, chapters, left, needs
    )


def whole_of(directory: Path) -> Whole:
    """recipe.json of a recipe's output. CorruptError-like ModelError if malformed."""
    path = directory / RECIPE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Whole)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ModelError(f"{path} does not describe a recipe's output", why=str(error)) from None


def _page(
    title: str,
    kicker: str,
    about: str,
    command: str,
    started: str,
    seconds: float,
    chapters: list[Chapter],
    unfinished: list[Part],
    needs: Mapping[str, Sequence[str]],
) -> Page:
    nodes, edges = ancestry(chapters, needs)
    versions: dict[str, str] = {}
    for chapter in chapters:
        versions |= chapter.record.versions
    return Page(
        title, kicker, about, command, started, seconds, chapters, unfinished, nodes, edges, versions,
        verified_line(chapters),
    )  # fmt: skip


def _verified(run: RunRecord) -> str:
    return "verified: read back equal" if run.verified.quantity == "finding" else str(run.verified)


def verified_line(chapters: Sequence[Chapter]) -> str:
    """One sentence over all outputs: the largest difference between what was made and what was saved."""
    if not chapters:
        return ""
    if len(chapters) == 1:
        return chapters[0].verified
    models = [c.record.verified for c in chapters if c.record.verified.quantity != "finding"]
    if not models:
        return f"verified: all {len(chapters)} findings read back equal"
    worst = max(models, key=lambda v: v.max_abs)
    return (
        f"verified: all {len(chapters)} outputs were reloaded and compared; "
        f"the largest difference is |Δ{worst.quantity}| = {worst.max_abs:.3g}"
    )


def _chapters(given: Sequence[tuple[Path, str, str, str]]) -> list[Chapter]:
    """One chapter a run directory; a model that an earlier one made goes by that run's name."""
    made: dict[str, str] = {}
    chapters = []
    for number, (directory, name, about, status) in enumerate(given, 1):
        run = records.read(directory)
        chapters.append(_chapter(number, directory, run, made, name, about, status))
        made.setdefault(run.output.digest, name)
        made.setdefault(f"serve:{directory.resolve()}", f"{name} over HTTP")
    return chapters


def _chapter(
    number: int, directory: Path, run: RunRecord, made: Mapping[str, str], name: str, about: str, status: str
) -> Chapter:
    finding = None
    if (directory / findings.FILE).exists():
        try:
            finding = findings.read(directory)
        except (LfmError, OSError):
            finding = None
    tables = [Table(evaluation, rows(run.before.get(evaluation, {}), after)) for evaluation, after in run.after.items()]
    tables += [Table(e, rows(before, {})) for e, before in run.before.items() if e not in run.after]
    shown = run.samples[:SAMPLES]
    samples = [_sampled(sample) for sample in shown]
    return Chapter(
        anchor=f"step-{number}",
        number=number,
        name=name,
        method=run.id,
        title=(run.title or about) or (finding.title if finding and _is(run) else "") or run.summary or run.id,
        sentence=sentence(run, finding, made),
        record=run,
        tables=tables,
        overview=overview(tables),
        finding=finding,
        cells=cells(finding),
        numeric=[_numeric(finding, column) for column in finding.columns] if finding else [],
        notes={k: v for k, v in run.notes.items() if not finding or k not in finding.metrics},
        verified=_verified(run),
        figures=figures(run, finding),
        samples=samples,
        more_samples=len(run.samples) - len(shown),
        edited=edited.shown(run),
        settings=[(key, words.short(msgspec.json.encode(v).decode(), 120)) for key, v in run.config.items()],
        status=status,
        headline=row(*moved) if (moved := headline(run)) and moved[1] else None,
    )


def _is(run: RunRecord) -> bool:
    """Whether a finding is what the run made, not what came with a model."""
    return run.output.kind == "finding"


def _sampled(sample: Sample) -> Sampled:
    before, after = sample.before.strip(), sample.after.strip()
    long = max(len(before), len(after)) > WORDS
    return Sampled(sample.prompt, before, after, "same" if before == after else "rewritten" if long else "changed")


def cells(finding: Finding | None) -> list[list[str]]:
    """The finding's first rows as text."""
    if finding is None:
        return []
    return [[_cell(row.get(column)) for column in finding.columns] for row in finding.rows[:ROWS]]


def _numeric(finding: Finding, column: str) -> bool:
    """Whether a column holds numbers, so that it is set flush right."""
    held = [row.get(column) for row in finding.rows[:ROWS]]
    return all(value is None or isinstance(value, (int, float)) for value in held) and any(v is not None for v in held)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float)):
        return words.number(value)
    return words.short(value if isinstance(value, str) else msgspec.json.encode(value).decode(), 240)


def figures(run: RunRecord, finding: Finding | None) -> list[Figure]:
    """The finding's maps and graphs, the run's curves, then the finding's."""
    made = [_heat(chart) for chart in finding.maps] if finding else []
    made += [Figure(graph.name, network.draw(graph)) for graph in finding.graphs] if finding else []
    made += [Figure(chart.name, scatter.draw(chart)) for chart in finding.scatters] if finding else []
    for name, ys in run.curves.items():
        blocks = str(run.notes.get("blocks_tried", "")).split(", ") if name.endswith("by block tried") else []
        xs, label = ([float(block) for block in blocks], "block") if len(blocks) == len(ys) > 1 else ([], "")
        made.append(Figure(words.metric(name), plots.line(ys, xs, name=name, x_label=label)))
    for curve in finding.curves if finding else ():
        svg = plots.line(curve.y, curve.x, name=curve.name, x_label=curve.x_label, y_label=curve.y_label)
        made.append(Figure(curve.name + (f" ({curve.y_label})" if curve.y_label else ""), svg))
    return [figure for figure in made if figure.svg][:CURVES]


def _heat(chart: Map) -> Figure:
    ends = [
        ["" if None in (a, b) else f"{words.number(a)} to {words.number(b)}" for a, b in zip(low, high, strict=True)]
        for low, high in zip(chart.low, chart.high, strict=True)
    ]
    svg = plots.heat(
        chart.values,
        chart.rows,
        chart.columns,
        name=chart.name,
        x_label=chart.x_label,
        unit=chart.unit,
        ends=ends,
    )
    return Figure(chart.name, svg)
