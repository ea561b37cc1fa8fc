"""Edits as patches: each a LoRA adapter of its own over one base, in a ledger from which any of them comes off.

A ledger is a directory: ledger.json, a directory for each patch (a plain PEFT adapter, its run and its requests), and
`head`, a link to the adapter that is their sum. The base is never written. ledger.json is replaced in one step, and all
else follows from it: a command that was killed is done, or it never began.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import msgspec

from lfm.core.errors import ConfigError, CorruptError, EditError, MismatchError, ModelError
from lfm.core.model import Adaptation, Codec, Gradients, LowRank, Model
from lfm.data.records import Edit
from lfm.runs import refs
from lfm.runs.execute import Order, execute
from lfm.runs.run import Show, silent

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.record import RunRecord

LEDGER, HEAD, HEADS, NEXT, LOCK = "ledger.json", "head", "heads", ".next", ".lock"

KEPT = ("run.json", "report.html", "README.md")
"""What is kept of the run that made a patch."""


@final
class Patch(msgspec.Struct, frozen=True, kw_only=True):
    """One commit. measured: what its method noted; on: whether it is part of the sum now."""

    number: int
    method: str
    seed: int
    config: dict[str, Any]
    edits: tuple[Edit, ...]
    measured: dict[str, float]
    made: str
    on: bool = True

    @property
    def place(self) -> str:
        return f"{self.number:04d}"


@final
class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """Patches in the order in which they were made, over a base. head: the sum's directory, or "" for the base."""

    base: str
    base_digest: str
    patches: tuple[Patch, ...] = ()
    head: str = ""

    @property
    def on(self) -> tuple[Patch, ...]:
        return tuple(patch for patch in self.patches if patch.on)


class Moved(NamedTuple):
    """One module's change by a patch: its rank, ‖ΔW‖_F, and its cosine with each other patch's change there."""

    module: str
    rank: int
    norm: float
    overlap: Mapping[int, float]


def read(directory: Path) -> Ledger:
    """The ledger of a directory. ModelError where there is none, CorruptError where it is malformed."""
    path = directory / LEDGER
    try:
        return msgspec.json.decode(path.read_bytes(), type=Ledger)
    except OSError:
        raise ModelError(
            f"{directory} is no ledger of edits",
            why=f"it has no {LEDGER}",
            fix="`lfm edit add DIR edits.jsonl --model BASE` begins one",
        ) from None
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise CorruptError(f"{path} is not a ledger", why=str(error)) from None


def model(directory: Path) -> Model:
    """The base with the patches that are on."""
    ledger = read(directory)
    return refs.model(str(directory / HEADS / ledger.head) if ledger.head else ledger.base)


def add(
    directory: Path,
    edits: str | Sequence[Edit],
    *,
    base: str = "",
    by: str = "edit.rome",
    settings: Mapping[str, Any] | None = None,
    data: Mapping[str, str] | None = None,
    seed: int = 0,
    recall: float = 1.0,
    show: Show = silent,
    report: Callable[[Path], None] | None = None,
    agree: Callable[[RunRecord], None] | None = None,
) -> Patch:
    """Make edits on top of those that are there, and commit them as a patch; it begins a ledger over `base`.

    EditError, and nothing committed, where the method refuses, or less than `recall` of the earlier edits that greedy
    text showed are shown after. agree is told of what was measured before the commit; what it raises, there is none.
    Killed, it resumes.
    """
    with _held(directory):
        ledger = _begun(directory, base)
        earlier = [edit for patch in ledger.on for edit in patch.edits]
        under = str(directory / HEADS / ledger.head) if ledger.head else ledger.base
        out = directory / NEXT
        shutil.rmtree(out, ignore_errors=True)
        order = Order(
            id=by,
            models={"model": (under,)},
            data={"edits": edits, **(data or {})},
            settings=settings or {},
            out=out,
            seed=seed,
            form="adapter",
        )
        done = execute(order, show=show, report=report)
        try:
            before, after = _changes(ledger, directory), refs.model(str(out)).ask(Adaptation).changes()
            parts = {name: _beyond(change, before.get(name)) for name, change in after.items()}
            show("asking the edits so far", 0, None)
            lost = _lost(refs.model(under), refs.model(str(out)), earlier)
            if len(lost) > (1 - recall) * len(earlier):
                raise EditError(
                    f"{len(lost)} of {len(earlier)} earlier edits would be lost",
                    why="; ".join(f"{edit.prompt!r} no longer says {edit.new_object!r}" for edit in lost[:3]),
                    fix="make them again together with these, edit elsewhere, or allow it: --recall",
                )
            patch = Patch(
                number=max((p.number for p in ledger.patches), default=0) + 1,
                method=by,
                seed=seed,
                config=dict(done.config),
                edits=tuple(edit for edit in refs.records(edits) if isinstance(edit, Edit)),
                measured={k: float(v) for k, v in done.notes.items() if isinstance(v, int | float)},
                made=done.started,
            )
            if agree:
                agree(done)
            new = {name: part for name, part in parts.items() if part is not None}
            put(directory, msgspec.structs.replace(ledger, patches=(*ledger.patches, patch)), new, out)
        finally:
            shutil.rmtree(out)
    return patch


def revert(directory: Path, number: int) -> Ledger:
    """Take a patch off: what is left is the sum of the others. It stays in the ledger, off."""
    with _held(directory):
        ledger = read(directory)
        found = _patch(ledger, number)
        if not found.on:
            raise ConfigError(f"patch {number} is off already")
        off = tuple(msgspec.structs.replace(p, on=False) if p is found else p for p in ledger.patches)
        return _commit(directory, msgspec.structs.replace(ledger, patches=off))


def squash(directory: Path) -> Ledger:
    """Make one patch of those that are on, exactly; those that are off are forgotten."""
    with _held(directory):
        ledger = read(directory)
        if not ledger.on:
            raise ConfigError(f"{directory} has no patch that is on", fix="`lfm edit log` shows what it has")
        last = ledger.on[-1]
        whole = Patch(
            number=max(p.number for p in ledger.patches) + 1,
            method=", ".join(dict.fromkeys(p.method for p in ledger.on)),
            seed=last.seed,
            config={},
            edits=tuple(edit for p in ledger.on for edit in p.edits),
            measured={},
            made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        changes = _changes(ledger, directory)
        done = put(directory, msgspec.structs.replace(ledger, patches=(whole,)), changes)
        for patch in ledger.patches:
            shutil.rmtree(directory / patch.place, ignore_errors=True)
        return done


def moved(directory: Path, number: int) -> list[Moved]:
    """What a patch changes, module by module, and how far others change the same."""
    ledger = read(directory)
    held = {p.number: _stored(directory, p) for p in (_patch(ledger, number), *ledger.on)}
    mine = held.pop(number)
    found = []
    for name, change in sorted(mine.items()):
        norm = _inner(change, change) ** 0.5
        overlap = {
            other: _inner(change, changes[name]) / (norm * _inner(changes[name], changes[name]) ** 0.5)
            for other, changes in held.items()
            if name in changes
        }
        found.append(Moved(name, change.a.shape[0], norm, overlap))
    return found


def without(directory: Path, number: int) -> Model:
    """The base with all patches that are on but this one."""
    ledger = read(directory)
    _patch(ledger, number)
    others = tuple(p for p in ledger.patches if p.number != number)
    return _summed(directory, msgspec.structs.replace(ledger, patches=others)) or refs.model(ledger.base)


def together(directory: Path, number: int) -> Model:
    """The base with all patches that are on, and this one."""
    ledger = read(directory)
    _patch(ledger, number)
    with_it = tuple(msgspec.structs.replace(p, on=p.on or p.number == number) for p in ledger.patches)
    summed = _summed(directory, msgspec.structs.replace(ledger, patches=with_it))
    assert summed is not None
    return summed


def _patch(ledger: Ledger, number: int) -> Patch:
    for patch in ledger.patches:
        if patch.number == number:
            return patch
    numbers = ", ".join(str(p.number) for p in ledger.patches) or "none"
    raise ConfigError(f"there is no patch {number}", fix=f"patches: {numbers}")


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """One command at a time; what a killed one left half-linked is mended first."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{directory} is in use by another command", fix="wait for it to end") from None
        if (directory / LEDGER).exists():
            _link(directory, read(directory))
        try:
            yield
        finally:
            if not (directory / LEDGER).exists():
                _leave(directory)


def _leave(directory: Path) -> None:
    """Nothing is left of a ledger that did not come to be, but the work of a run that can go on."""
    (directory / LOCK).unlink(missing_ok=True)
    with suppress(OSError):
        directory.rmdir()


def _begun(directory: Path, base: str) -> Ledger:
    if not (directory / LEDGER).exists():
        if not base:
            raise ConfigError(f"{directory} is no ledger yet", fix="name the model to edit: --model")
        under = refs.model(base)
        return Ledger(base=under.ref, base_digest=under.digest)
    ledger = read(directory)
    now = refs.model(base or ledger.base)
    if now.digest != ledger.base_digest:
        raise MismatchError(
            f"{directory} holds edits of another model",
            why=f"{now.ref} has digest {now.digest[:12]}, its base {ledger.base} had {ledger.base_digest[:12]}",
            fix="begin another ledger for this model, or put the base back",
        )
    return ledger


def _stored(directory: Path, patch: Patch) -> Mapping[str, LowRank]:
    return refs.model(str(directory / patch.place)).ask(Adaptation).changes()


def _changes(ledger: Ledger, directory: Path) -> dict[str, LowRank]:
    """The sum of the patches that are on, factors side by side in their order."""
    from lfm.tensors.lowrank import joined

    parts: dict[str, list[LowRank]] = {}
    for patch in ledger.on:
        for name, change in _stored(directory, patch).items():
            parts.setdefault(name, []).append(change)
    return {name: joined(changes, [1.0] * len(changes)) for name, changes in parts.items()}


def _summed(directory: Path, ledger: Ledger) -> Model | None:
    from lfm.models.adapter import of_changes

    changes = _changes(ledger, directory)
    return of_changes(refs.model(ledger.base), changes, {}) if changes else None


def _beyond(change: LowRank, before: LowRank | None) -> LowRank | None:
    """What a change has beside an earlier one, whose factors it begins with; None where there is nothing."""
    first = before.a.shape[0] if before is not None else 0
    assert before is None or (change.a[:first].double() == before.a.double()).all(), "patches go on top of each other"
    return change._replace(b=change.b[:, first:], a=change.a[first:]) if change.a.shape[0] > first else None


def _lost(before: Model, after: Model, edits: Sequence[Edit]) -> list[Edit]:
    """Edits that greedy text shows before and not after."""
    from lfm.editing.text import answered

    asked = [(edit.prompt, edit.new_object) for edit in edits]
    then, now = (answered(m.ask(Gradients).module(), m.ask(Codec), asked) if asked else [] for m in (before, after))
    return [edit for edit, said, says in zip(edits, then, now) if said and not says]


def put(directory: Path, ledger: Ledger, changes: Mapping[str, LowRank], run: Path | None = None) -> Ledger:
    """Commit a ledger whose last patch is new: these changes, with what is kept of its run."""
    from lfm.models.adapter import of_changes

    def fill(into: Path) -> None:
        of_changes(refs.model(ledger.base), changes, {}).save(into)
        for name in KEPT:
            if run is not None and (run / name).exists():
                shutil.copyfile(run / name, into / name)

    _made(directory / ledger.patches[-1].place, fill)
    return _commit(directory, ledger)


def _made(place: Path, fill: Callable[[Path], None]) -> None:
    partial = place.with_name(f".{place.name}.partial")
    for leftover in (partial, place):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    partial.rename(place)


def _commit(directory: Path, ledger: Ledger) -> Ledger:
    """The ledger as it is from now on."""
    summed = _summed(directory, ledger)
    head = summed.digest[:16] if summed else ""
    if summed and not (directory / HEADS / head).exists():
        _made(directory / HEADS / head, lambda into: _save(summed, into))
    done = msgspec.structs.replace(ledger, head=head)
    partial = directory / f"{LEDGER}.partial"
    with partial.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(done), indent=1) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(directory / LEDGER)
    _link(directory, done)
    return done


def _save(model: Model, into: Path) -> None:
    model.save(into)


def _link(directory: Path, ledger: Ledger) -> None:
    """`head` leads to the ledger's sum, and other sums are gone."""
    link, wanted = directory / HEAD, f"{HEADS}/{ledger.head}"
    if not ledger.head:
        link.unlink(missing_ok=True)
    elif not link.is_symlink() or str(link.readlink()) != wanted:
        partial = directory / f"{HEAD}.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(wanted)
        partial.replace(link)
    for old in (directory / HEADS).glob("*") if (directory / HEADS).exists() else ():
        if old.name != ledger.head:
            shutil.rmtree(old, ignore_errors=True)


def _inner(one: LowRank, other: LowRank) -> float:
    """⟨B A, B' A'⟩_F without either product."""
    b: Tensor = one.b.double().T @ other.b.double()
    a: Tensor = one.a.double() @ other.a.double().T
    return float((b * a).sum())
