"""The checks that every method must pass, as functions of a method's id and its case."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, final

import pytest

from case import Case
from lfm import runs
from lfm.core import registry
from lfm.core.errors import AccessError, SlotError
from lfm.core.finding import Finding
from lfm.core.home import home
from lfm.core.method import Inputs, Run, check
from lfm.core.model import Model
from lfm.runs import ledger
from lfm.runs.verification import compare

TESTS = Path(__file__).parent.parent / "methods"


def case_of(id: str) -> Callable[[Path], Case]:
    """The case in a method's own test file, tests/methods/AREA/test_NAME.py."""
    area, name = id.split(".", 1)
    path = TESTS / area / f"test_{name}.py"
    assert path.exists(), f"{id} has no test file {path}"
    spec = importlib.util.spec_from_file_location(f"case_{area}_{name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert hasattr(module, "case"), f"{path} defines no case(here)"
    return module.case


def order(id: str, case: Case, here: Path, out: str) -> runs.Order:
    return runs.Order(
        id=id,
        models={role: [here / name for name in names] for role, names in case.models.items()},
        data={role: here / name for role, name in case.data.items()},
        settings=case.settings,
        out=here / out,
        seed=7,
    )


def inputs_of(id: str, case: Case, here: Path) -> Inputs:
    given = order(id, case, here, "unused")
    return Inputs(
        {role: tuple(runs.model(ref) for ref in refs) for role, refs in given.models.items()},
        {role: runs.records(ref) for role, ref in given.data.items()},
    )


def spied(model: Model, name: str, kinds: tuple[type, ...], used: set[type]) -> Model:
    """A handle that gives what is declared, remembers what was asked, and does not tell where the model lies."""
    seen = model.only(kinds)

    def opener(kind: type, open: Callable[[], Any]) -> Callable[[], Any]:
        def asked() -> Any:
            used.add(kind)
            return open()

        return asked

    return replace(seen, ref=name, gives={k: opener(k, o) for k, o in seen.gives.items()}, _opened={})


@final
@dataclass
class Watched:
    """A method at work on spies. used: the interfaces that it asked for, by role; result: what it made."""

    used: dict[str, set[type]] = field(default_factory=dict)
    result: Model | Finding | None = None


@contextmanager
def watching(id: str) -> Iterator[Watched]:
    """Every run of the method is on spies while this lasts."""
    module = importlib.import_module(registry.ids()[id])
    method, seen = module.METHOD, Watched()

    def run(config: Any, inputs: Inputs, run: Run) -> Model | Finding:
        spies = {
            role: tuple(
                spied(m, f"spy {role} {place}", method.models[role].declared, seen.used.setdefault(role, set()))
                for place, m in enumerate(given)
            )
            for role, given in inputs.models.items()
        }
        seen.result = method.run(config, Inputs(spies, inputs.data), run)
        return seen.result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "METHOD", replace(method, run=run))
        yield seen


class Made(NamedTuple):
    """What a method made of its case, in `here`/out. before: its inputs' digests then. ticks: of its progress."""

    id: str
    case: Case
    here: Path
    before: dict[str, list[str]]
    done: runs.RunRecord
    ticks: int
    watched: Watched


def digests(id: str, case: Case, here: Path) -> dict[str, list[str]]:
    return {role: [m.digest for m in given] for role, given in inputs_of(id, case, here).models.items()}


def made(id: str, case: Case, here: Path) -> Made:
    ticks = 0

    def count(*_: Any) -> None:
        nonlocal ticks
        ticks += 1

    given = inputs_of(id, case, here).models
    before = {role: [m.digest for m in models] for role, models in given.items()}
    # a program's parts were spies, which do not tell where they lie: so they are looked for by digest
    ledger.add(ledger.Entry(digest=m.digest, path=m.ref) for models in given.values() for m in models)
    with watching(id) as watched:
        done = runs.execute(order(id, case, here, "out"), show=count)
    return Made(id, case, here, before, done, ticks, watched)


def uses_what_it_declares(one: Made) -> None:
    """It works with a handle that gives nothing else, and it asks for everything that it makes a condition."""
    method, result = registry.get(one.id).method, one.watched.result
    if isinstance(result, Model):
        compare(result, result)  # a program asks its parts when it is asked
        forms = method.forms
        assert not forms or (forms[0] == next(iter(result.formats)) and set(result.formats) <= set(forms))
    for role, slot in method.models.items():
        if role in one.watched.used:
            unused = set(slot.needs) - one.watched.used[role]
            assert not unused, f"{one.id} demands {[k.__name__ for k in unused]} of {role!r} and never asks for it"


def leaves_inputs_alone(one: Made) -> None:
    assert digests(one.id, one.case, one.here) == one.before


def same_seed_same_digest(one: Made) -> None:
    with watching(one.id):
        other = runs.execute(order(one.id, one.case, one.here, "other"))
    assert other.output.digest == one.done.output.digest


def saves_what_it_made(one: Made) -> None:
    done, out = one.done, one.here / "out"
    assert done.verified.max_abs == 0
    assert runs.verify(out).max_abs == 0
    assert (done.output.kind == "finding") == (registry.get(one.id).method.gives == "finding")
    if done.output.kind != "finding":
        assert runs.model(out).digest == done.output.digest


def refuses_before_loading(one: Made) -> None:
    """A role left empty, and one filled by a model that gives nothing: one clear error, and nothing is opened."""
    listed = registry.get(one.id)

    def explode() -> Any:
        raise AssertionError("something was opened")

    for role, slot in listed.method.models.items():
        if slot.min == 0:
            continue
        others = {r: m for r, m in inputs_of(one.id, one.case, one.here).models.items() if r != role}
        with pytest.raises(SlotError, match=role):
            check(one.id, listed.method, Inputs(others, {}))
        nothing = Model(ref="an empty model", kind="checkpoint", gives={}, identify=explode, look=explode)
        with pytest.raises(AccessError, match="an empty model") as caught:
            given = {**others, role: (nothing,) * slot.min}
            check(one.id, listed.method, Inputs(given, {}), alternatives=lambda: ["probe.other"])
        assert "probe.other" in str(caught.value)
        for kind in (*slot.needs, *slot.any_of):
            assert kind.__name__.lower() in str(caught.value)


class Interrupted(BaseException):
    """A kill, as Python sees it."""


def resumes_to_the_same_digest(one: Made) -> None:
    """Interrupted at one point after another, and run on each time, it makes what it makes when left alone.

    Nothing of what it made then is there: so it also shows that the same seed gives the same digest.
    """
    points = sorted({max(1, one.ticks * share // 8) for share in (1, 4, 7)})
    reached = interrupted(one, "cut", points)
    assert reached, "nothing of its progress was shown"
    if reached < len(points):
        assert interrupted(one, "late", points[-1:]) == 1


def interrupted(one: Made, out: str, points: Sequence[int]) -> int:
    """How many of these points it was interrupted at; where it has less to do the second time, it may end before."""
    shutil.rmtree(home() / "editing", ignore_errors=True)  # else less is left to interrupt than the first time
    reached = 0
    for point in [*points, 0]:
        left = point

        def stop(*_: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Interrupted

        try:
            with watching(one.id):
                done = runs.execute(order(one.id, one.case, one.here, out), show=stop)
        except Interrupted:
            reached += 1
            assert not (one.here / out).exists()
            continue
        assert done.output.digest == one.done.output.digest
        break
    return reached


def example_of(doc: str) -> list[str]:
    """The arguments of a docstring's first `lfm …` line, and of the lines that it goes on in after a backslash."""
    lines = [line.strip() for line in re.sub(r"\\\n", " ", doc).splitlines()]
    found = next((line for line in lines if line.startswith(("lfm run ", "lfm merge "))), "")
    return shlex.split(found)[1:]


def example_runs(id: str, run_command: Callable[[list[str]], int]) -> None:
    """The docstring's `lfm run …` line, as written, where the case's files lie."""
    command = example_of(registry.get(id).doc)
    assert command, f"the docstring of {id} has no example"
    assert run_command(command) == 0
