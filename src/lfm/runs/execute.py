"""One run: models in, a verified new model (or finding) out, in a directory that stands alone."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, final

from lfm import record
from lfm.core import finding, launched, registry
from lfm.core.config import Config, configure, values
from lfm.core.errors import ConfigError, DataError, LfmError, OutputError
from lfm.core.finding import Finding
from lfm.core.method import METRICS, RECORDS, Inputs, Slot, check
from lfm.core.model import Model
from lfm.data import files, suited
from lfm.data.records import Record, kind_of
from lfm.models.budget import Budget, Meter
from lfm.models.tally import Tally
from lfm.record import DataInput, Input, Measure, Output, RunRecord, Sample
from lfm.runs import card, directory, ledger, looking, manifest, planning, refs, together, undoing, verification
from lfm.runs.plan import HEADROOM, LIMIT
from lfm.runs.run import LocalRun, Show, silent
from lfm.tensors.parallel import at_most
from lfm.tensors.readback import reading_back
from lfm.tensors.refusal import accepting_nonfinite

FORMATS = ("checkpoint", "adapter", "program", "peft")
"""What models are saved as, and a program's second form."""

LOOKED_AT, SHOWN = 24, 5
"""Answers of each evaluation that are compared, and kept: those first that changed."""

ASKED = "asked.sqlite"
"""In a run's scratch directory: what models on this machine were asked so far."""

PACKAGES = ("learn-from-model", "torch", "transformers", "peft", "safetensors", "numpy")


@final
@dataclass(frozen=True)
class Order:
    """What is asked for: a method, what fills its roles, its settings, and where the result goes.

    models, data: role → references (or what they refer to). evals: data on which the first model and the result are
    measured. form: the format to save in, where the result has several. budget: (queries, tokens) of endpoints.
    allow_nonfinite: NaN and infinities of weights take part in streamed arithmetic, instead of an error. memory: bytes
    that may be used, if there is a limit; it decides threads, and never the result.
    """

    id: str
    models: Mapping[str, Sequence[str | Path | Model]]
    data: Mapping[str, str | Path | Sequence[Record]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    out: Path = Path("out")
    seed: int = 0
    evals: Sequence[str | Path | Sequence[Record]] = ()
    form: str = ""
    budget: tuple[int | None, int | None] = (None, None)
    allow_nonfinite: bool = False
    memory: int | None = None
    title: str = ""
    command: str = ""


@final
@dataclass(frozen=True)
class Prepared:
    """An order whose references are opened and whose inputs are checked; no weight has been read."""

    order: Order
    listed: registry.Listed
    config: Any
    whole: Inputs  # everything each model gives: for evaluation
    inputs: Inputs  # what the method may use
    evals: Mapping[str, tuple[Record, ...]]
    meter: Meter  # what its endpoints are charged to


def prepare(order: Order, show: Show = silent, *, spending: Path | None = None) -> Prepared:
    """Open and check everything that can fail before work begins. Raises the LfmError that says what to mend.

    spending: a file in which what endpoints are asked is counted against the order's budget; in memory without it.
    """
    listed = registry.get(order.id)
    config = configure(listed.method.config, order.settings, where=order.id)
    meter = Meter(Budget(*order.budget, spending))
    opened = {
        role: tuple(refs.model(ref, show=show, meter=meter) for ref in given) for role, given in order.models.items()
    }
    kinds = {role: slot.kinds[0] for role, slot in listed.method.data.items() if slot.kinds}
    data = {role: refs.records(ref, kind=kinds.get(role, "text"), show=show) for role, ref in order.data.items()}
    whole = Inputs(opened, data)
    inputs = check(order.id, listed.method, whole, alternatives=partial(_alternatives, opened))
    suited.declared(listed.method, inputs)
    if listed.method.agree:
        listed.method.agree(config, inputs)
    evals = dict(zip(_names(order.evals), (refs.records(ref, show=show) for ref in order.evals), strict=True))
    _fitting(order, listed, whole, evals, config)
    return Prepared(order, listed, config, whole, inputs, evals, meter)


def execute(order: Order, *, show: Show = silent, report: Callable[[Path], None] | None = None) -> RunRecord:
    """Run it, and have the ledger know of it. Of several processes that were launched, one makes the directory."""
    if launched.size() > 1 and not launched.leads():
        return together.follow(partial(_method, order), lambda: record.read(order.out))
    make = partial(made, order, show=show, report=report)
    done = together.lead(make) if launched.size() > 1 else make()
    ledger.add(ledger.entries_of(order.out))
    return done


def _method(order: Order, work: Path) -> None:
    """The method alone, its result forgotten: a follower's share of a run."""
    prepared = prepare(order)
    prepared.listed.method.run(prepared.config, prepared.inputs, LocalRun(order.seed, work))


def made(order: Order, *, show: Show = silent, report: Callable[[Path], None] | None = None) -> RunRecord:
    """Run it. The directory `order.out` appears whole, or not at all; run again after a kill, it resumes.

    report: writes a page about the finished directory into it, before it is published.
    """
    began, cpu = time.time(), _cpu()
    if os.path.lexists(order.out):
        raise OutputError(f"{order.out} exists", fix="choose another --out, or remove it first")
    with directory.paid(order.out, limited=order.budget != (None, None)) as spending:
        prepared = prepare(order, show, spending=spending)
    show("reading inputs", 0, None)
    key = key_of(prepared)
    estimate = planning.plan(prepared)
    if short := next((lack for lack in estimate.lacks if lack.startswith("disk")), ""):
        raise OutputError(f"{order.out} would not fit", why=short, fix="free some space, or choose an --out elsewhere")
    if short := next((lack for lack in estimate.lacks if lack.startswith(LIMIT)), ""):
        raise ConfigError(
            f"{order.id} cannot keep to {LIMIT}", why=short.removeprefix(f"{LIMIT}: "), fix=_that_would_fit(prepared)
        )
    with (
        at_most(estimate.threads or None),
        accepting_nonfinite(order.allow_nonfinite),
        directory.claim(order.out, key) as work,
    ):
        run = LocalRun(order.seed, work, show)
        first = next((m[0] for m in prepared.whole.models.values() if m), None)
        before = _evaluate(run, "before", first, prepared.evals)
        together.go(work)
        tally = Tally(Meter(Budget(path=work / directory.SCRATCH / ASKED)))
        made = prepared.listed.method.run(prepared.config, tally.inputs(prepared.inputs, prepared.whole), run)
        together.all_ready()
        here = tally.meter.spent()  # checks of what was made are not the method's
        tally.counts = False
        artefact = work / "artefact"
        shutil.rmtree(artefact, ignore_errors=True)
        artefact.mkdir()
        show("saving", 0, None)
        looks = manifest.Looks(manifest.begun(prepared))
        with reading_back(looks.of) as seen:
            written = made.save(artefact, *([order.form] if order.form and isinstance(made, Model) else []))
        show("verifying", 0, None)
        reopen = partial(refs.model, show=show, meter=prepared.meter)  # checks and evaluations ask endpoints too
        verified = verification.held_against(
            written or made, artefact, reopen, seen=seen, by_bits=order.allow_nonfinite
        )
        saved = made if isinstance(made, Finding) else reopen(artefact)
        listed = manifest.write(saved, looks, seen, verified, artefact)
        after = {} if isinstance(saved, Finding) else _evaluate(run, "after", saved, prepared.evals)
        edited = looking.looked(run, prepared, saved)
        undoable = isinstance(made, Model) and undoing.keep(made, _input(prepared), artefact)
        done = RunRecord(
            id=order.id,
            key=key,
            config=values(prepared.config),
            seed=order.seed,
            inputs=tuple(_inputs(prepared)),
            data=tuple(_data(prepared)),
            output=_output(saved, order, artefact),
            verified=verified,
            summary=prepared.listed.summary,
            title=order.title,
            before={name: e["metrics"] for name, e in before.items()},
            after={name: e["metrics"] for name, e in after.items()},
            notes={**run.notes, **(made.metrics if isinstance(made, Finding) else {})},
            curves={name: tuple(points) for name, points in run.curves.items()},
            samples=_samples(before, after),
            edited=edited,
            command=order.command,
            versions=versions(),
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
            seconds=round(time.time() - began, 3),
            cpu_seconds=round(_cpu() - cpu, 3),
            planned_seconds=estimate.seconds,
            queries=(spent if (spent := prepared.meter.spent()).queries else here).queries
            or int(run.notes.get("queries", 0)),
            tokens=(spent if spent.queries else here).tokens,
            undo=undoable,
            manifest=listed,
            allow_nonfinite=order.allow_nonfinite,
        )
        record.write(done, artefact)
        card.write(done, artefact, prepared.listed.method.paper)
        if (work / directory.SCRATCH / finding.FILE).exists():
            finding.read(work / directory.SCRATCH).save(artefact)
        for name in (METRICS, RECORDS):
            if (told := work / directory.SCRATCH / name).exists():
                shutil.copy(told, artefact / name)
        if report:
            report(artefact)
        directory.publish(work, artefact, order.out)
    return done


def key_of(prepared: Prepared) -> str:
    """sha256 over all that decides the result: method, settings, inputs by digest, seed, evaluations, lfm's version."""
    order = prepared.order
    whole = {
        "id": order.id,
        "config": values(prepared.config),
        "models": {role: [m.digest for m in given] for role, given in prepared.inputs.models.items()},
        "data": {role: files.digest(r) for role, r in prepared.inputs.data.items()},
        "evals": {name: files.digest(r) for name, r in prepared.evals.items()},
        "seed": order.seed,
        "form": order.form,
        "allow_nonfinite": order.allow_nonfinite,
        "version": metadata.version("learn-from-model"),
    }
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _that_would_fit(prepared: Prepared) -> str:
    """Settings of a training that keep to the memory that may be used."""
    from lfm.train import Fit
    from lfm.train.cost import smaller

    allowed = prepared.order.memory
    if allowed is None or not isinstance(prepared.config, Fit):
        return "allow it that much"

    def needed(config: Fit) -> int:
        return planning.plan(replace(prepared, config=config)).memory

    return smaller(prepared.config, needed, allowed, HEADROOM)


def versions() -> dict[str, str]:
    """What ran: Python, the platform, and the packages that results depend on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **_packages(),
    }


@cache
def _packages() -> dict[str, str]:
    """Asked once: each version is parsed out of a file."""
    return {name: metadata.version(name) for name in PACKAGES}


def _alternatives(opened: Mapping[str, tuple[Model, ...]]) -> list[str]:
    """Methods in which several models can play the very roles that they are given; else those that each works with."""
    if len(opened) > 1 and (found := [m.id for m in registry.methods() if _plays(m.method.models, opened)]):
        return found
    given = [set(m.gives) for models in opened.values() for m in models]
    return [m.id for m in registry.methods(have=set.intersection(*given))] if given else []


def _plays(slots: Mapping[str, Slot], opened: Mapping[str, tuple[Model, ...]]) -> bool:
    if opened.keys() - slots.keys():
        return False
    return all(
        slot.min <= len(opened.get(role, ())) <= (slot.max or len(opened.get(role, ())))
        and not any(slot.missing(model.gives) for model in opened.get(role, ()))
        for role, slot in slots.items()
    )


def _fitting(
    order: Order, listed: registry.Listed, whole: Inputs, evals: Mapping[str, tuple[Record, ...]], config: Config
) -> None:
    """Refuses what would fail once the work is done: a format that there is not, data that no model here can take."""
    if order.form and (order.form not in FORMATS or listed.method.gives == "finding"):
        formats = ", ".join(FORMATS)
        raise ConfigError(
            f"{order.id} has no format {order.form!r}",
            fix="leave --format out" if listed.method.gives == "finding" else f"formats, by what is saved: {formats}",
        )
    forms = listed.method.forms
    if order.form and forms and order.form not in forms:
        raise ConfigError(
            f"{order.id} has no format {order.form!r}",
            why="its change is not of low rank" if order.form == "adapter" else "",
            fix=f"formats: {', '.join(forms)}",
        )
    if order.form and listed.method.formed and order.form not in (forms := listed.method.formed(config)):
        raise ConfigError(
            f"{order.id} has no format {order.form!r} with these settings",
            fix=f"formats: {', '.join(forms)}; or other settings",
        )
    if not evals:
        return
    from lfm.evals import suits

    for name, data in evals.items():
        refused: list[LfmError] = []
        given = [model for models in whole.models.values() for model in models]
        for model in given:
            try:
                suits(model, data)
                break
            except LfmError as error:
                refused.append(error)
        if refused and len(refused) == len(given):
            first = refused[0]
            raise DataError(f"no model here can be measured on {name}", why=first.what, fix=first.fix or first.why)


def _names(given: Sequence[Any]) -> list[str]:
    """What each evaluation goes by: its file's name, with the directory before it where two are called the same."""
    paths = [Path(str(ref).removeprefix("zoo:")) if isinstance(ref, str | Path) else None for ref in given]
    stems = [path.stem if path else f"data{place or ''}" for place, path in enumerate(paths)]
    names = [
        f"{path.parent.name}/{stem}" if path and stems.count(stem) > 1 and path.parent.name else stem
        for path, stem in zip(paths, stems)
    ]
    return [name if names.count(name) == 1 else f"{name} {names[: i + 1].count(name)}" for i, name in enumerate(names)]


def _evaluate(run: LocalRun, when: str, model: Model | None, evals: Mapping[str, tuple[Record, ...]]) -> dict[str, Any]:
    """Each evaluation's metrics and samples; kept as a step, so that a resumed run does not pay again."""
    if model is None or not evals:
        return {}
    from lfm.evals import evaluate

    found: dict[str, Any] = {}
    for name, data in evals.items():

        def measured(name: str = name, data: tuple[Record, ...] = data) -> dict[str, Any]:
            run.show(f"measuring {name} {when}", 0, None)
            result = evaluate(model, data, seed=run.seed, samples=LOOKED_AT)
            return {
                "metrics": {
                    m: [v.value, v.low, v.high, v.n]
                    for m, v in result.metrics.items()
                    if all(map(math.isfinite, (v.value, v.low, v.high)))  # JSON has no infinity
                },
                "samples": [[s.prompt, s.answer] for s in result.samples],
            }

        try:
            kept = run.step(f"{when} {name} {model.digest}", measured)
        except LfmError as error:
            if when == "before":
                continue  # an input that cannot take this data says nothing about the output
            raise error
        found[name] = {
            "metrics": {m: Measure(value=v[0], low=v[1], high=v[2], n=v[3]) for m, v in kept["metrics"].items()},
            "samples": kept["samples"],
        }
    return found


def _samples(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Sample, ...]:
    found = []
    for name, measured in after.items():
        then = dict(before.get(name, {}).get("samples", []))
        said = [Sample(prompt=p, before=then.get(p, ""), after=a) for p, a in measured["samples"]]
        found += sorted(said, key=lambda sample: sample.before == sample.after)[:SHOWN]
    return tuple(found)


def _input(prepared: Prepared) -> Model | None:
    return next((m[0] for m in prepared.whole.models.values() if m), None)


def _inputs(prepared: Prepared) -> list[Input]:
    found = []
    for role, given in prepared.whole.models.items():
        for ref, model in zip(prepared.order.models[role], given, strict=True):
            shown = model.ref if isinstance(ref, Model) else str(ref)
            path = str(Path(model.ref).resolve()) if Path(model.ref).exists() else ""
            found.append(
                Input(
                    role=role,
                    ref=shown,
                    path=path,
                    kind=model.kind,
                    digest=model.digest,
                    facts={k: v for k, v in model.facts._asdict().items() if k not in ("labels", "vocabulary_digest")},
                )
            )
    return found


def _data(prepared: Prepared) -> list[DataInput]:
    return [
        DataInput(
            role=role,
            ref=_file(ref) or "records given in Python",
            digest=files.digest(prepared.whole.data[role]),
            records=len(prepared.whole.data[role]),
            kind=kind_of(prepared.whole.data[role][0]) if prepared.whole.data[role] else "",
        )
        for role, ref in prepared.order.data.items()
    ]


def _file(ref: str | Path | Sequence[Record]) -> str:
    if isinstance(ref, files.Lines):
        return str(ref.path)
    return str(ref) if isinstance(ref, str | Path) else ""


def _output(saved: Model | Finding, order: Order, artefact: Path) -> Output:
    size = sum(file.stat().st_size for file in artefact.rglob("*") if file.is_file())
    if isinstance(saved, Finding):
        return Output(kind="finding", digest=saved.digest, format="finding", bytes=size)
    return Output(kind=saved.kind, digest=saved.digest, format=order.form or saved.kind, bytes=size)


def _cpu() -> float:
    mine = os.times()
    return mine.user + mine.system + mine.children_user + mine.children_system
