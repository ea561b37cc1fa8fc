"""A recipe's plan: every job checked and weighed without running any.

What a job will be given by an earlier one, or by the zoo before it is made, is assumed: of the size of what that comes
from, and giving what is asked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lfm import runs, zoo
from lfm.core import registry
from lfm.core.config import configure
from lfm.core.errors import AccessError, LfmError, ModelError
from lfm.core.interfaces import Embeddings, Logprobs, Text, Top, Vectors, names_of
from lfm.core.method import Amount, Cost, Data, Sizes, Slot
from lfm.core.model import Facts, Model
from lfm.data import files
from lfm.data.records import Record
from lfm.recipe.expand import SERVE, Job, mentions, name_of, parse_reference
from lfm.recipe.job import Asked, located, order_of
from lfm.recipe.parse import Recipe
from lfm.runs.machine import Machine, machine
from lfm.runs.plan import Plan, weigh

ASSUMED = Facts(
    task="causal-lm",
    architecture="assumed",
    parameters=2_000_000,
    bytes=8_000_000,
    dtype="float32",
    vocabulary=2048,
    layers=4,
    width=128,
)
"""A language model of the zoo's size, where nothing is known yet."""

ASSUMED_DATA = {
    Data.FEW_SHOT: Amount(64, 2_000),
    Data.UNLABELED: Amount(1000, 50_000),
    Data.LABELED: Amount(1000, 50_000),
}
"""Records that are not there yet, by how much a method asks of them."""

CARRIED = (Text, Top, Logprobs, Embeddings, Vectors)
"""What a model can be asked over HTTP, at most."""


def plan(recipe: Recipe, jobs: Sequence[Job], out: Path, *, on: Machine | None = None) -> dict[str, Plan]:
    """Every job's plan, by name. Raises what would stop the recipe, with file and line."""
    here = on or machine(out)
    near = Path(recipe.path).absolute().parent
    facts: dict[str, Facts] = {}
    plans = {}
    for job in jobs:
        try:
            plans[job.name], facts[job.name] = _one(job, facts, near, here, out)
        except LfmError as error:
            raise recipe.wrap(job.trail, error) from None
    return plans


def _one(job: Job, known: Mapping[str, Facts], near: Path, here: Machine, out: Path) -> tuple[Plan, Facts]:
    method = registry.get(job.method).method
    if _all_there(job, near):  # then it is checked as the run itself will check it
        runs.prepare(order_of(Asked(job, out, {job.name: out / job.folder}, near, "")))
    settings = {key: value for key, value in job.settings.items() if not any(mentions(value))}
    config = configure(method.config, settings, where=job.method)
    models: dict[str, tuple[Facts, ...]] = {}
    gives: dict[str, tuple[Collection[type], ...]] = {}
    there: dict[str, Model] = {}
    for role, refs in job.models.items():
        slot = method.models[role]
        if len(refs) < slot.min or (slot.max is not None and len(refs) > slot.max):
            most = "or more" if slot.max is None else f"to {slot.max}"
            raise AccessError(f"{job.method} takes {slot.min} {most} models for {role!r}, got {len(refs)}")
        found = [_model(ref, role, slot, job, near) for ref in refs]
        models[role] = tuple(one.facts if one else _facts(ref, known) for one, ref in zip(found, refs, strict=True))
        gives[role] = tuple(_given(ref, one, slot) for one, ref in zip(found, refs, strict=True))
        if found and found[0]:
            there[role] = found[0]
    records = {role: _records(ref, near) for role, ref in job.data.items()}
    data = {
        role: ASSUMED_DATA.get(method.data[role].level, Amount(0, 0)) if some is None else files.amount(some)
        for role, some in records.items()
    }

    def questions(role: str, asked: str) -> tuple[int, int] | None:
        some = records[role]
        return files.questions(some, there[asked]) if some and asked in there else None

    cost: Cost = method.cost(config, Sizes(models, data, gives, files.labels(records), questions))
    access = {role: method.models[role].asked for role in models}
    first = next((held[0] for held in models.values() if held), ASSUMED)
    asks = any(ref.startswith(("api:", SERVE)) for refs in job.models.values() for ref in refs)
    reads = sum(facts.bytes for held in models.values() for facts in held)
    return weigh(job.method, cost, here, access=access, asks=asks, reads=reads), first


def _all_there(job: Job, near: Path) -> bool:
    """Whether nothing that the job takes is still to be made, or behind HTTP."""
    models = [ref for refs in job.models.values() for ref in refs]
    records = [*job.data.values(), *job.eval]
    if any(mentions([*models, *records, job.settings])) or any(ref.startswith(("api:", SERVE)) for ref in models):
        return False
    kinds = ((models, "model"), (records, "data"))
    return not any(ref.startswith("zoo:") and _unmade(ref, kind) for refs, kind in kinds for ref in refs)


def _model(ref: str, role: str, slot: Slot, job: Job, near: Path) -> Model | None:
    """What a reference names, or would put behind HTTP; None where that is still to be made, or an endpoint."""
    inner = ref.removeprefix(SERVE)
    if any(mentions(inner)) or inner.startswith("api:") or (inner.startswith("zoo:") and _unmade(inner, "model")):
        return None
    model = runs.model(located(inner, near))
    missing = [] if ref != inner else slot.missing(model.gives.keys())
    if missing:
        lacks = ", ".join(names_of(missing))
        raise AccessError(
            f"{job.method} asks {lacks} of {role!r}, which {ref} does not give",
            why=model.offers,
        )
    return model


def _facts(ref: str, known: Mapping[str, Facts]) -> Facts:
    """Of what is still to be made: of the size of what it is made from."""
    for inside in mentions(ref.removeprefix(SERVE)):
        reference = parse_reference(inside)
        assert reference is not None
        return known.get(name_of(reference.step, reference.point or {}), ASSUMED)
    return ASSUMED


def _given(ref: str, model: Model | None, slot: Slot) -> Collection[type]:
    """What can be asked of it in this slot: of an endpoint what HTTP carries; of what is still to be made, anything."""
    if ref.startswith(("api:", SERVE)):
        return [kind for kind in slot.declared if kind in CARRIED]
    return [kind for kind in slot.declared if model is None or kind in model.gives]


def _records(ref: str, near: Path) -> Sequence[Record] | None:
    """None where they are still to be made."""
    if any(mentions(ref)) or (ref.startswith("zoo:") and _unmade(ref, "data")):
        return None
    return runs.records(ref) if ref.startswith("zoo:") else files.read(located(ref, near))


def _unmade(ref: str, kind: str) -> bool:
    """Whether an exhibit of the zoo is still to be made. ModelError for a name that it does not have."""
    name = ref.removeprefix("zoo:")
    known = {entry.name: entry for entry in zoo.listing() if entry.kind == kind}
    if name not in known:
        near = get_close_matches(name, known, n=1)
        fix = f"did you mean zoo:{near[0]}?" if near else "`lfm zoo` lists all"
        raise ModelError(f"the zoo has no {kind} {name!r}", fix=fix)
    return not known[name].made


def total(plans: Mapping[str, Plan]) -> dict[str, Any]:
    """The whole recipe: time one after another, the most memory of any, disk and queries together."""
    each = list(plans.values())
    return {
        "seconds": [sum(p.seconds[0] for p in each), sum(p.seconds[1] for p in each)],
        "memory": max((p.memory for p in each), default=0),
        "disk": sum(p.disk for p in each),
        "queries": sum(p.queries for p in each),
        "tokens": sum(p.tokens for p in each),
        "lacks": [f"{name}: {lack}" for name, p in plans.items() for lack in p.lacks],
    }
