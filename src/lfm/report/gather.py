"""Run directories → what the page shows of them, in the order in which it shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import msgspec

from lfm import record as records
from lfm.core import finding as findings
from lfm.core.errors import LfmError, ModelError
from lfm.core.finding import Finding
from lfm.record import Input, Measure, RunRecord, Sample
from lfm.report import plots, words
from lfm.report.lineage import Node
from lfm.report.plots import Estimate

RECIPE = "recipe.json"
"""What a recipe's output directory tells of its jobs, beside one run directory a job."""

MANY = 4
"""Evaluations from which on the page shows one metric of each first."""

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


class Row(NamedTuple):
    """A metric before and after."""

    name: str
    before: str
    after: str
    change: str
    verdict: str  # better, worse, same or ""
    interval: str
    plot: str
    n: int


class Table(NamedTuple):
    """The metrics of one evaluation."""

    evaluation: str
    rows: list[Row]


class Overview(NamedTuple):
    """One metric over many evaluations."""

    metric: str
    rows: list[Row]


class Figure(NamedTuple):
    """A curve: its title and its SVG."""

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
    return chapters


def _chapter(
    number: int, directory: Path, run: RunRecord, made: Mapping[str, str], name: str, about: str, status: str
) -> Chapter:
    finding = None
    if run.output.kind == "finding":
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
        title=about or (finding.title if finding else "") or run.summary or run.id,
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
        settings=[(key, words.short(msgspec.json.encode(v).decode(), 120)) for key, v in run.config.items()],
        status=status,
        headline=_row(*moved) if (moved := headline(run)) and moved[1] else None,
    )


def overview(tables: Sequence[Table]) -> Overview | None:
    """The first metric of every evaluation, where there are many and all have it; else None."""
    if len(tables) < MANY or not all(table.rows for table in tables):
        return None
    first = tables[0].rows[0].name
    found = [(table.evaluation, next((row for row in table.rows if row.name == first), None)) for table in tables]
    return Overview(first, [row._replace(name=name) for name, row in found if row is not None])


def _sampled(sample: Sample) -> Sampled:
    before, after = sample.before.strip(), sample.after.strip()
    long = max(len(before), len(after)) > WORDS
    return Sampled(sample.prompt, before, after, "same" if before == after else "rewritten" if long else "changed")


def rows(before: Mapping[str, Measure], after: Mapping[str, Measure]) -> list[Row]:
    """Every metric that is known before or after, in the order of after."""
    return [_row(name, before.get(name), after.get(name)) for name in dict.fromkeys([*after, *before])]


def _row(name: str, old: Measure | None, new: Measure | None) -> Row:
    a, b = _estimate(old), _estimate(new)
    change, verdict = "", ""
    if old and new and math.isfinite(old.value) and math.isfinite(new.value):
        difference = new.value - old.value
        change = words.signed(difference)
        apart = new.n > 0 and (new.low > old.high or new.high < old.low)
        better = (difference < 0) == words.smaller_is_better(name)
        verdict = "same" if not apart or difference == 0 else "better" if better else "worse"
    last = new or old
    interval = ""
    if last and last.high > last.low:
        interval = f"{words.number(last.low)} – {words.number(last.high)}"
    return Row(
        words.metric(name),
        words.number(old.value) if old else "–",
        words.number(new.value) if new else "–",
        change,
        verdict,
        interval,
        plots.change(a, b),
        last.n if last else 0,
    )


def _estimate(measure: Measure | None) -> Estimate | None:
    return Estimate(measure.value, measure.low, measure.high, measure.n) if measure else None


def sentence(run: RunRecord, finding: Finding | None, made: Mapping[str, str] | None = None) -> str:
    """What came in, and what came of it. made: digest → the name of the run on this page that made it."""
    known = made or {}
    models = _grouped([(i.role, known.get(i.digest) or _tail(i.ref)) for i in run.inputs])
    data = [f"{words.number(d.records)} {d.kind} records from {d.ref}".replace("  ", " ") for d in run.data]
    told = f"From {', '.join(models)}" if models else "From nothing"
    if data:
        told += f", with {words.listed(data)}"
    if finding is not None:
        numbers = [f"{words.metric(k)} {words.number(v)}" for k, v in list(finding.metrics.items())[:3]]
        return told + (f": {words.listed(numbers)}." if numbers else f": {finding.title}.")
    moved = headline(run)
    if moved:
        name, old, new = moved
        if old is None:
            return f"{told}: {words.metric(name)} {words.number(new.value)}."
        if words.number(old.value) == words.number(new.value):
            return f"{told}: {words.metric(name)} stays {words.number(new.value)}."
        return f"{told}: {words.metric(name)} from {words.number(old.value)} to {words.number(new.value)}."
    return f"{told}: a {run.output.kind} of {words.size(run.output.bytes)}." if run.output.bytes else told + "."


def headline(run: RunRecord) -> tuple[str, Measure | None, Measure] | None:
    """The run's first metric that is known before and after, else its first after; over many evaluations, its mean.

    A mean over evaluations has no interval, which n = 0 tells.
    """
    first = next((name for metrics in run.after.values() for name in metrics), "")
    pairs = [(run.before.get(e, {}).get(first), metrics.get(first)) for e, metrics in run.after.items()]
    both = [(old.value, new.value) for old, new in pairs if old is not None and new is not None]
    if len(both) >= MANY and len(both) == len(pairs):
        old, new = (sum(values) / len(both) for values in zip(*both))
        name = f"mean {first} over {len(both)} sets"
        return name, Measure(value=old, low=old, high=old, n=0), Measure(value=new, low=new, high=new, n=0)
    for evaluation, after in run.after.items():
        for name, new in after.items():
            old = run.before.get(evaluation, {}).get(name)
            if old is not None:
                return name, old, new
    for after in run.after.values():
        for name, new in after.items():
            return name, None, new
    return None


def _grouped(pairs: Sequence[tuple[str, str]]) -> list[str]:
    by_role: dict[str, list[str]] = {}
    for role, ref in pairs:
        by_role.setdefault(role, []).append(words.short(ref, 40))
    named = []
    for role, refs in by_role.items():
        some = words.listed(refs) if len(refs) <= 3 else f"{len(refs)} models"
        named.append(some if role in ("model", "models") else f"{some} as {role}")
    return named


def _tail(ref: str) -> str:
    """A reference as short as it stays clear; what is served is named by what it is."""
    if ref.startswith("serve:"):
        return f"{_tail(ref.removeprefix('serve:'))} over HTTP"
    return ref if ref.startswith(("zoo:", "api:")) or "/" not in ref else "/".join(Path(ref).parts[-2:])


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
    return words.short(value if isinstance(value, str) else msgspec.json.encode(value).decode(), 90)


def figures(run: RunRecord, finding: Finding | None) -> list[Figure]:
    """The run's curves, then the finding's."""
    made = [Figure(words.metric(name), plots.line(ys, name=name)) for name, ys in run.curves.items()]
    for curve in finding.curves if finding else ():
        svg = plots.line(curve.y, curve.x, name=curve.name, x_label=curve.x_label, y_label=curve.y_label)
        made.append(Figure(curve.name + (f" ({curve.y_label})" if curve.y_label else ""), svg))
    return [figure for figure in made if figure.svg][:CURVES]


def ancestry(
    chapters: Sequence[Chapter], needs: Mapping[str, Sequence[str]]
) -> tuple[list[Node], list[tuple[str, str]]]:
    """The lineage's boxes: what came from outside, then one a run; its edges by path, by digest and by need."""
    made_by_digest = {c.record.output.digest: c.anchor for c in reversed(chapters)}
    by_name = {c.name: c.anchor for c in chapters}
    sources: dict[str, Node] = {}
    edges: dict[tuple[str, str], None] = {}
    order = {c.anchor: c.number for c in chapters}
    for chapter in chapters:
        for need in needs.get(chapter.name, ()):
            if need in by_name:
                edges[by_name[need], chapter.anchor] = None
        for given in chapter.record.inputs:
            parent = made_by_digest.get(given.digest)
            if parent is not None and order[parent] < chapter.number:
                edges[parent, chapter.anchor] = None
            elif not given.ref.startswith("serve:") or not needs:
                key = given.digest or given.ref
                edges[key, chapter.anchor] = None
                for node, parents in _before(given):
                    sources.setdefault(node.id, node)
                    edges |= {(parent, node.id): None for parent in parents}
    made = [
        Node(
            id=c.anchor,
            lines=(c.name, c.method, *([gist(c.record)] if gist(c.record) else [])),
            kind="finding" if c.record.output.kind == "finding" else "model",
            href=f"#{c.anchor}",
        )
        for c in chapters
    ]
    return [*sources.values(), *made], list(edges)


def _before(given: Input, seen: frozenset[str] = frozenset()) -> list[tuple[Node, list[str]]]:
    """An input as a box, and what it was made from as far as that still lies there; each with its parents' ids."""
    key = given.digest or given.ref
    made = _made(given)
    if made is None or key in seen:
        return [(Node(id=key, lines=(_tail(given.ref), given.kind), kind="source"), [])]
    parents = [i.digest or i.ref for i in made.inputs]
    node = Node(id=key, lines=(made.title or Path(given.path).name, made.id, gist(made)))
    return [(node, parents), *(pair for i in made.inputs for pair in _before(i, seen | {key}))]


def _made(given: Input) -> RunRecord | None:
    """The run that made an input, where its directory is what it was then."""
    if not given.path or not (Path(given.path) / records.RUN).is_file():
        return None
    try:
        made = records.read(Path(given.path))
    except LfmError:
        return None
    return made if made.output.digest == given.digest else None


def gist(run: RunRecord) -> str:
    """What a run changed in a few words; empty where nothing was measured."""
    moved = headline(run)
    if moved is None:
        return ""
    name, old, new = moved
    value = words.number(new.value) if old is None else f"{words.number(old.value)} → {words.number(new.value)}"
    return f"{words.metric(name)} {value}"
