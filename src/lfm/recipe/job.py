"""One job of a recipe: its references looked up, its run kept or made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lfm import record, report, runs
from lfm.core.errors import RecipeError
from lfm.recipe import place
from lfm.recipe.expand import SERVE, Job, name_of, parse_reference, substitute
from lfm.record import RunRecord
from lfm.runs.command import command

SCHEMES = ("zoo:", "api:", SERVE)


@final
@dataclass(frozen=True)
class Asked:
    """A job, and where everything lies. folders: job → its run directory; near: the recipe's own directory."""

    job: Job
    root: Path
    folders: Mapping[str, Path]
    near: Path
    place: str  # file:line, for errors


def work(asked: Asked, show: Callable[[str, int, int | None], None]) -> str:
    """Make the job's run directory, or keep the one of the same key; "done" or "kept"."""
    order = order_of(asked)
    prepared = runs.prepare(order, show)
    if place.kept(asked.root, order.out, runs.key_of(prepared)):
        return "kept"

    def page(made: Path) -> None:
        report.write(made, name=asked.job.name)

    runs.execute(order, show=show, report=page)
    return "done"


def order_of(asked: Asked) -> runs.Order:
    """The order that a job places, with every reference looked up."""
    job = asked.job

    def look(inside: str) -> Any:
        return lookup(asked, inside)

    models = {role: [located(str(r), asked.near) for r in substitute(refs, look)] for role, refs in job.models.items()}
    data = {role: located(str(substitute(ref, look)), asked.near) for role, ref in job.data.items()}
    evals = tuple(located(str(ref), asked.near) for ref in substitute(job.eval, look))
    settings, out = substitute(job.settings, look), asked.folders[job.name]
    return runs.Order(
        id=job.method,
        models=models,
        data=data,
        settings=settings,
        out=out,
        seed=job.seed,
        evals=evals,
        form=job.format,
        title=substitute(job.about, look),
        allow_nonfinite=job.allow_nonfinite,
        command=command(
            job.method,
            models,
            data,
            settings,
            out,
            seed=job.seed,
            evals=evals,
            form=job.format,
            allow_nonfinite=job.allow_nonfinite,
        ),
    )


def located(ref: str, near: Path) -> str:
    """A reference as lfm.runs takes it: a relative path is looked for beside the recipe first."""
    if ref.startswith(SERVE):
        return SERVE + located(ref.removeprefix(SERVE), near)
    if ref.startswith(SCHEMES) or Path(ref).is_absolute() or not (near / ref).exists():
        return ref
    return str(near / ref)


def lookup(asked: Asked, inside: str) -> Any:
    """What a reference to a finished job stands for: its directory, or a number that it measured."""
    reference = parse_reference(inside)
    assert reference is not None, inside
    folder = asked.folders[name_of(reference.step, reference.point or {})]
    if not reference.rest:
        return str(folder)
    done = record.read(folder)
    found = _value(done, reference.rest)
    if found is None:
        raise RecipeError(
            f"{asked.place}: ${{{inside}}}: {name_of(reference.step, reference.point or {})} measured no such thing",
            fix=f"it has {', '.join(known_values(done)) or 'neither metrics nor notes'}",
        )
    return found


def _value(done: RunRecord, rest: tuple[str, ...]) -> Any:
    kind, *names = rest
    if kind == "notes":
        return done.notes.get(".".join(names))
    tables = done.after
    if names[:1] == ["before"]:
        tables, names = done.before, names[1:]
    for evaluation, metrics in tables.items():
        for name in (".".join(names), ".".join(names[1:]) if names[:1] == [evaluation] else ""):
            if name in metrics:
                return metrics[name].value
    return done.notes.get(".".join(names))  # a finding's numbers are its notes


def known_values(done: RunRecord) -> list[str]:
    """Every value of a run that a recipe may refer to."""
    metrics = [f"metrics.{name}" for table in done.after.values() for name in table]
    return list(dict.fromkeys([*metrics, *(f"notes.{name}" for name in done.notes)]))
