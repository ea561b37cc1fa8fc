"""A recipe's steps → jobs: matrices written out, references checked, in an order in which each can run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple, final

from msgspec import structs

from lfm.core import registry
from lfm.core.config import configure
from lfm.core.errors import LfmError, RecipeError
from lfm.recipe.parse import Recipe, Step, Trail

REFERENCE = re.compile(r"\$\{([^{}]*)\}")
INSIDE = re.compile(r"(?P<step>[a-z][a-z0-9_-]*)(?:\[(?P<point>[^\]]*)\])?(?P<rest>(?:\.[\w@%-]+)*)")
SERVE = "serve:"
"""`serve:REF` as a model: REF behind HTTP, reached as an endpoint is."""


class Reference(NamedTuple):
    """What stands in `${…}`. point: None (no brackets), {} for [*], or the matrix values; rest: metrics.name, …"""

    step: str
    point: dict[str, str] | None
    rest: tuple[str, ...]


@final
@dataclass(frozen=True)
class Job:
    """One run. Values still hold `${job}` references to the jobs it needs; parameters and matrices are filled in."""

    name: str
    step: str
    method: str
    about: str
    models: dict[str, list[str]]
    data: dict[str, str]
    settings: dict[str, Any]
    eval: list[str]
    format: str
    allow_nonfinite: bool
    seed: int
    point: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    trail: Trail = ()

    @property
    def folder(self) -> str:
        """Where it goes below the recipe's output: the step's id, and the matrix point below it."""
        return "/".join([self.step, *([_label(self.point)] if self.point else [])])


def expand(recipe: Recipe, overrides: Mapping[str, Any] | None = None, *, seed: int | None = None) -> tuple[Job, ...]:
    """Every job of a recipe, each after those it needs. RecipeError with file:line.

    overrides: "step.setting" or "params.name" → value, as `--set` gives them.
    """
    recipe = override(recipe, overrides or {})
    points = {step.id: list(_points(step)) for step in recipe.document.steps}
    jobs: dict[str, Job] = {}
    for i, step in enumerate(recipe.document.steps):
        trail: Trail = ("steps", i)
        _check_step(recipe, trail, step)
        _check_models(recipe, trail, step)
        for point in points[step.id]:
            job = _job(recipe, trail, step, point, points, seed)
            _check_settings(recipe, trail, job)
            jobs[job.name] = job
    return tuple(jobs[name] for name in _order(recipe, jobs))


def override(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe with settings and parameters replaced."""
    document = recipe.document
    steps = {step.id: step for step in document.steps}
    for name, value in overrides.items():
        head, _, key = name.partition(".")
        if head == "params" and key in document.params:
            document = structs.replace(document, params={**document.params, key: value})
        elif head in steps and key:
            steps[head] = structs.replace(
                steps[head], set={**steps[head].set, key: value}, matrix=_without(steps[head], key)
            )
        else:
            known = [f"params.{p}" for p in document.params] + [f"{s}.SETTING" for s in steps]
            raise RecipeError(f"--set {name}: nothing of that name in {recipe.path}", fix=f"known: {', '.join(known)}")
    return structs.replace(recipe, document=structs.replace(document, steps=list(steps.values())))


def references(text: str) -> list[str]:
    """The insides of every `${…}` in a text."""
    return REFERENCE.findall(text)


def parse_reference(inside: str) -> Reference | None:
    """`step[rank=4].metrics.accuracy` in parts; None if it is not of that form."""
    match = INSIDE.fullmatch(inside.strip())
    if match is None:
        return None
    point: dict[str, str] | None = None
    if match["point"] is not None:
        point = {}
        if match["point"].strip() != "*":
            for pair in match["point"].split(","):
                key, equals, value = pair.partition("=")
                if not equals:
                    return None
                point[key.strip()] = value.strip()
    return Reference(match["step"], point, tuple(filter(None, match["rest"].split("."))))


def substitute(value: Any, look: Callable[[str], Any]) -> Any:
    """Every `${…}` in a value replaced by look(inside); a text that is one reference takes the value's own type."""
    if isinstance(value, list):
        return [substitute(item, look) for item in value]
    if isinstance(value, dict):
        return {key: substitute(item, look) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    whole = REFERENCE.fullmatch(value)
    if whole:
        return look(whole[1])
    return REFERENCE.sub(lambda match: str(look(match[1])), value)


def mentions(value: Any) -> Iterator[str]:
    """The insides of every `${…}` anywhere in a value."""
    if isinstance(value, str):
        yield from references(value)
    elif isinstance(value, dict):
        for item in value.values():
            yield from mentions(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from mentions(item)


def _without(step: Step, key: str) -> dict[str, list[Any]]:
    return {name: values for name, values in step.matrix.items() if name != key}


def _points(step: Step) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*step.matrix.values()):
        yield dict(zip(step.matrix, values))


def _label(point: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={re.sub(r'[^A-Za-z0-9_.+-]+', '-', str(value))}" for key, value in point.items())


def name_of(step: str, point: Mapping[str, Any]) -> str:
    """A job's name: its step's id, and its point in brackets."""
    return f"{step}[{_label(point)}]" if point else step


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _check_step(recipe: Recipe, trail: Trail, step: Step) -> None:
    try:
        method = registry.get(step.method).method
    except LfmError as error:
        raise recipe.wrap((*trail, "method"), error) from None
    for key, roles, slots in (("models", step.models, method.models), ("data", step.data, method.data)):
        for role in roles:
            if role not in slots:
                near = get_close_matches(role, slots, n=1)
                raise recipe.error(
                    (*trail, key, role),
                    f"{step.method} has no {key[:5].rstrip('s')} slot {role!r}",
                    fix=f"did you mean {near[0]!r}?" if near else f"its slots: {', '.join(slots) or 'none'}",
                )
    varied = {key.partition(".")[2] for key in step.matrix if "." in key}
    for role, slot in method.models.items():
        if slot.min > 0 and role not in step.models and role not in varied:
            raise recipe.error(trail, f"{step.method} needs a model for {role!r}", fix=f"add models: {{{role}: REF}}")
    for role, slot in method.data.items():
        if not slot.optional and role not in step.data and role not in varied:
            raise recipe.error(trail, f"{step.method} needs data for {role!r}", fix=f"add data: {{{role}: FILE}}")
    for key, values in step.matrix.items():
        here = (*trail, "matrix", key)
        head, dot, role = key.partition(".")
        if dot and (head not in ("models", "data") or role not in getattr(method, head)):
            raise recipe.error(here, f"a matrix varies a setting, models.ROLE or data.ROLE, not {key!r}")
        if not values:
            raise recipe.error(here, "a matrix needs at least one value")
        if key in step.set:
            raise recipe.error(here, f"{key!r} is in both set and matrix")


def _check_models(recipe: Recipe, trail: Trail, step: Step) -> None:
    """A step whose method gives a finding is no model for another."""
    findings = {s.id: s.method for s in recipe.document.steps if _gives(s.method) == "finding"}
    for role, refs in step.models.items():
        for inside in mentions(refs):
            reference = parse_reference(inside)
            if reference and not reference.rest and reference.step in findings:
                raise recipe.error(
                    (*trail, "models", role),
                    f"${{{inside}}} is a finding, not a model",
                    why=f"that is what {findings[reference.step]} gives",
                    fix="name a step that makes a model",
                )


def _gives(id: str) -> str:
    return registry.get(id).method.gives if id in registry.ids() else ""


def _job(
    recipe: Recipe, trail: Trail, step: Step, point: dict[str, Any], points: Mapping[str, list[Any]], seed: int | None
) -> Job:
    needs: dict[str, None] = {}

    def fill(value: Any, here: Trail, *, many: bool = False) -> Any:
        """Parameters filled in; references to steps made exact; `[*]` written out where many may stand."""
        if many:
            filled = []
            for i, item in enumerate(_listed(value)):
                spot = (*here, i) if isinstance(value, list) else here
                filled += _written_out(recipe, item, spot, points)
            texts = [fill(item, here) for item in filled]
            return [text for each in texts for text in (each if isinstance(each, list) else [each])]
        if isinstance(value, list):
            return [fill(item, (*here, i)) for i, item in enumerate(value)]
        if isinstance(value, dict):
            return {key: fill(item, (*here, key)) for key, item in value.items()}

        def look(inside: str) -> Any:
            found = _look(recipe, inside, here, points)
            if isinstance(found, Reference):
                name = name_of(found.step, found.point or {})
                needs[name] = None
                return "${" + ".".join([name, *found.rest]) + "}"
            return found[0]

        return substitute(value, look)

    settings = dict(step.set)
    models: dict[str, Any] = dict(step.models)
    data: dict[str, Any] = dict(step.data)
    for key, value in point.items():
        head, dot, role = key.partition(".")
        ({"models": models, "data": data}[head] if dot else settings)[role or key] = value
    own = step.seed if step.seed is not None else recipe.document.seed if seed is None else seed
    job = Job(
        name=name_of(step.id, point),
        step=step.id,
        method=step.method,
        about=fill(step.about, (*trail, "about")),
        models={role: fill(refs, (*trail, "models", role), many=True) for role, refs in models.items()},
        data={role: str(fill(ref, (*trail, "data", role))) for role, ref in data.items()},
        settings=fill(settings, (*trail, "set")),
        eval=fill(step.eval, (*trail, "eval"), many=True),
        format=step.format,
        allow_nonfinite=step.allow_nonfinite,
        seed=_seed(recipe, trail, fill(own, (*trail, "seed"))),
        point=point,
        trail=trail,
    )
    return replace(job, needs=tuple(needs))


def _seed(recipe: Recipe, trail: Trail, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise recipe.error((*trail, "seed"), f"a seed is a whole number, not {value!r}") from None


def _written_out(recipe: Recipe, item: str, here: Trail, points: Mapping[str, list[Any]]) -> list[str]:
    """`${tuned[*]}` as one reference a matrix point; anything else as it is."""
    if not isinstance(item, str):
        raise recipe.error(here, f"a reference is text, not {item!r}")
    whole = REFERENCE.fullmatch(item)
    reference = parse_reference(whole[1]) if whole else None
    if reference is None or reference.point != {} or reference.step not in points:
        return [item]
    rest = "".join(f".{part}" for part in reference.rest)
    return ["${" + name_of(reference.step, point) + rest + "}" for point in points[reference.step]]


def _look(recipe: Recipe, inside: str, here: Trail, points: Mapping[str, list[Any]]) -> Reference | tuple[Any]:
    """A parameter's value in a 1-tuple, or an exact reference to one job."""
    reference = parse_reference(inside)
    shape = "write ${step}, ${step[key=value]}, ${step.metrics.name} or ${params.name}"
    if reference is None:
        raise recipe.error(here, f"${{{inside}}} cannot be read", fix=shape)
    if reference.step == "params":
        name = ".".join(reference.rest)
        if name not in recipe.document.params:
            known = ", ".join(recipe.document.params) or "none"
            raise recipe.error(here, f"${{{inside}}}: no parameter {name!r}", fix=f"parameters: {known}")
        return (recipe.document.params[name],)
    if reference.step not in points:
        near = get_close_matches(reference.step, points, n=1)
        raise recipe.error(
            here,
            f"${{{inside}}}: no step {reference.step!r}",
            fix=f"did you mean {near[0]!r}?" if near else f"steps: {', '.join(points)}",
        )
    if reference.rest and reference.rest[0] not in ("metrics", "notes"):
        raise recipe.error(here, f"${{{inside}}}: a step has metrics and notes, not {reference.rest[0]!r}", fix=shape)
    choices = points[reference.step]
    wanted = reference.point or {}
    labels = [{key: _label({key: value}).partition("=")[2] for key, value in point.items()} for point in choices]
    fits = [point for point, label in zip(choices, labels) if wanted.items() <= label.items()]
    if len(fits) != 1:
        named = ", ".join("${" + name_of(reference.step, point) + "}" for point in choices)
        why = f"{reference.step!r} has {len(choices)} runs, and {len(fits)} of them fit"
        raise recipe.error(here, f"${{{inside}}} does not name one run", why=why, fix=f"one of {named}")
    return reference._replace(point=fits[0])


def _check_settings(recipe: Recipe, trail: Trail, job: Job) -> None:
    """Settings that are known now must be settings of the method; ones that a step will give are checked by then."""
    kind = registry.get(job.method).method.config
    known = {key: value for key, value in job.settings.items() if not any(mentions(value))}
    unknown = {key: kind_default(kind, key) for key in job.settings if key not in known}
    for key, value in {**known, **unknown}.items():
        try:
            configure(kind, {key: value})
        except LfmError as error:
            spot = "matrix" if key in job.point else "set"
            raise recipe.wrap((*trail, spot, key), error) from None


def kind_default(kind: type, name: str) -> Any:
    """A setting's default; None where there is no such setting."""
    from lfm.core.config import fields

    return next((field.default for field in fields(kind) if field.name == name), None)


def _order(recipe: Recipe, jobs: Mapping[str, Job]) -> list[str]:
    """Every job after those it needs, otherwise as written."""
    place = {name: i for i, name in enumerate(jobs)}
    sorter = TopologicalSorter({name: job.needs for name, job in jobs.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        circle = list(reversed(error.args[1]))
        first = min(circle, key=lambda name: place[name])
        raise recipe.error(jobs[first].trail, f"steps need each other: {' → '.join(circle)}") from None
    order = []
    ready = sorted(sorter.get_ready(), key=place.__getitem__)
    while ready:
        name = ready.pop(0)
        order.append(name)
        sorter.done(name)
        ready = sorted([*ready, *sorter.get_ready()], key=place.__getitem__)
    return order
