"""What a run measured, as rows, plots and sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lfm.core.finding import Finding
from lfm.record import Measure, RunRecord
from lfm.report import plots, words
from lfm.report.plots import Estimate

MANY = 4
"""Evaluations from which on the page shows one metric of each first."""


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


def overview(tables: Sequence[Table]) -> Overview | None:
    """The first metric of every evaluation, where there are many and all have it; else None."""
    if len(tables) < MANY or not all(table.rows for table in tables):
        return None
    first = tables[0].rows[0].name
    found = [(table.evaluation, next((row for row in table.rows if row.name == first), None)) for table in tables]
    return Overview(first, [row._replace(name=name) for name, row in found if row is not None])


def rows(before: Mapping[str, Measure], after: Mapping[str, Measure]) -> list[Row]:
    """Every metric that is known before or after, in the order of after."""
    return [row(name, before.get(name), after.get(name)) for name in dict.fromkeys([*after, *before])]


def row(name: str, old: Measure | None, new: Measure | None) -> Row:
    """A metric before and after; better or worse only where the intervals lie apart."""
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
    models = _grouped([(i.role, known.get(i.digest) or known.get(i.ref) or tail(i.ref)) for i in run.inputs])
    data = [f"{words.number(d.records)} {d.kind} records from {d.ref}".replace("  ", " ") for d in run.data]
    told = f"From {', '.join(models)}" if models else "From nothing"
    if data:
        told += f", with {words.listed(data)}"
    if isinstance(left := run.notes.get("skipped"), float | int) and left:
        told += f", {words.number(int(left))} edit{'s' if left > 1 else ''} left out"
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
    return _noted_change(run)


def _noted_change(run: RunRecord) -> tuple[str, Measure | None, Measure] | None:
    """What the method itself measured before and after, accuracy before loss; without an interval."""
    names = [key.removesuffix("_before") for key in run.notes if key.endswith("_before")]
    for name in sorted(names, key=words.smaller_is_better):
        old, new = run.notes[f"{name}_before"], run.notes.get(f"{name}_after")
        if isinstance(old, (int, float)) and isinstance(new, (int, float)):
            return name, Measure(value=old, low=old, high=old, n=0), Measure(value=new, low=new, high=new, n=0)
    return None


def _grouped(pairs: Sequence[tuple[str, str]]) -> list[str]:
    by_role: dict[str, list[str]] = {}
    for role, ref in pairs:
        by_role.setdefault(role, []).append(words.short(ref, 40))
    roles_of: dict[tuple[str, ...], list[str]] = {}
    for role, refs in by_role.items():
        roles_of.setdefault(tuple(refs), []).append(role)
    named = []
    for refs, roles in roles_of.items():
        role = words.listed(roles)
        some = words.listed(list(refs)) if len(refs) <= 3 else f"{len(refs)} models"
        named.append(some if role in ("model", "models") else f"{some} as {role}")
    return named


def tail(ref: str) -> str:
    """A reference as short as it stays clear; what is served is named by what it is."""
    if ref.startswith("serve:"):
        return f"{tail(ref.removeprefix('serve:'))} over HTTP"
    return ref if ref.startswith(("zoo:", "api:")) or "/" not in ref else "/".join(Path(ref).parts[-2:])


def gist(run: RunRecord) -> str:
    """What a run changed in a few words; empty where nothing was measured."""
    moved = headline(run)
    if moved is None:
        return ""
    name, old, new = moved
    value = words.number(new.value) if old is None else f"{words.number(old.value)} → {words.number(new.value)}"
    return f"{words.metric(name)} {value}"
