"""Edits as patches: each an artefact of its own over one base, in a ledger from which any of them comes off.

A ledger is a directory: ledger.json, a directory for each patch (a plain PEFT adapter, or a program with a memory; its
run and its requests), and `head`, a link to what they make together. The base is never written. ledger.json is replaced
in one step, and all else follows from it: a command that was killed is done, or it never began.
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

from lfm.core.errors import ConfigError, CorruptError, DataError, EditError, MismatchError, ModelError
from lfm.core.model import Codec, Gradients, Model, Text
from lfm.core.writing import writing
from lfm.data.files import where
from lfm.data.records import Edit
from lfm.runs import refs, stacks
from lfm.runs.execute import Order, execute
from lfm.runs.run import Show, silent
from lfm.runs.stacks import Moved, Stack

if TYPE_CHECKING:
    from lfm.record import RunRecord

LEDGER, HEAD, HEADS, NEXT, LOCK = "ledger.json", "head", "heads", ".next", ".lock"

USUAL = "edit.rome"
"""The editor where none is named."""

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
    """Patches in the order in which they were made, over a base. head: the sum's directory, or "" for the base.

    memory: the method in whose memory the edits are; "" where patches are changes of weights.
    """

    base: str
    base_digest: str
    memory: str = ""
    patches: tuple[Patch, ...] = ()
    head: str = ""

    @property
    def on(self) -> tuple[Patch, ...]:
        return tuple(patch for patch in self.patches if patch.on)


class Again(NamedTuple):
    """Another patch's facts, asked with and without a patch: how many there are, and how many greedy text shows."""

    patch: int
    facts: int
    without: int
    together: int


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
    under = _base(directory, ledger)
    return refs.model(str(directory / HEADS / ledger.head)) if ledger.head else under


def add(
    directory: Path,
    edits: str | Sequence[Edit],
    *,
    base: str = "",
    by: str = "",
    settings: Mapping[str, Any] | None = None,
    data: Mapping[str, str] | None = None,
    seed: int = 0,
    recall: float = 1.0,
    show: Show = silent,
    report: Callable[[Path], None] | None = None,
    agree: Callable[[RunRecord], None] | None = None,
) -> Patch:
    """Make edits on top of those that are there, and commit them as a patch; it begins a ledger over `base`.

    by: the editor; a memory's own where none is named, else edit.rome. ConfigError for one whose edits do not come off.

    EditError, and nothing committed, where the method refuses, or less than `recall` of the earlier edits that greedy
    text showed are shown after. agree is told of what was measured before the commit; what it raises, there is none.
    Killed, it resumes.
    """
    with _held(directory):
        ledger = _begun(directory, base)
        by = by or ledger.memory or USUAL
        stack = stacks.of_method(by)
        ledger = _of_kind(directory, ledger, stack)
        _allowed(directory, ledger, stack, settings or {}, edits)
        earlier = [edit for patch in ledger.on for edit in patch.edits]
        under = str(directory / HEADS / ledger.head) if ledger.head else ledger.base
        before = under if ledger.head else _emptied(directory, ledger)
        out = directory / NEXT
        shutil.rmtree(out, ignore_errors=True)
        order = Order(
            id=by,
            models=stack.models(ledger.base, before),
            data={**(data or {}), "edits": edits},
            settings=settings or {},
            out=out,
            seed=seed,
            form=stack.form,
        )
        done = execute(order, show=show, report=report)
        try:
            held = stack.held(refs.model(under)) if ledger.head else None
            new = stack.beyond(held, stack.held(refs.model(str(out))))
            show("asking the edits so far", 0, None)
            shown, lost = _lost(refs.model(under), refs.model(str(out)), earlier)
            if (shown - len(lost)) / max(1, shown) < recall and lost:
                raise EditError(
                    f"{len(lost)} of {shown} earlier edits would be lost",
                    why="; ".join(f"{edit.prompt!r} no longer says {edit.new_object!r}" for edit in lost[:3]),
                    fix="make them again together with these, edit elsewhere, or allow it: --recall",
                )
            patch = Patch(
                number=max((p.number for p in ledger.patches), default=0) + 1,
                method=by,
                seed=seed,
                config=dict(done.config),
                edits=stack.edits(new) or _kept(refs.model(str(out)), refs.records(edits), done),
                measured={k: float(v) for k, v in done.notes.items() if isinstance(v, int | float)},
                made=done.started,
            )
            if agree:
                agree(done)
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
            config=last.config if ledger.memory else {},
            edits=tuple(edit for p in ledger.on for edit in p.edits),
            measured={},
            made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        held = _stack(ledger).whole([_held_by(directory, ledger, p) for p in ledger.on])
        done = put(directory, msgspec.structs.replace(ledger, patches=(whole,)), held)
        for patch in ledger.patches:
            shutil.rmtree(directory / patch.place, ignore_errors=True)
        return done


def moved(directory: Path, number: int) -> list[Moved]:
    """What a patch changes, place by place, and how far others change the same."""
    ledger = read(directory)
    held = {p.number: _held_by(directory, ledger, p) for p in (_patch(ledger, number), *ledger.on)}
    mine = held.pop(number)
    return _stack(ledger).moved(mine, held)


def again(directory: Path, number: int) -> list[Again]:
    """What the facts of each other patch that is on come to without a patch, and with it."""
    ledger = read(directory)
    others = [p for p in ledger.on if p.number != number]
    edits = [edit for p in others for edit in p.edits]
    then, now = (iter(_said(model, edits)) for model in (without(directory, number), together(directory, number)))
    return [
        Again(p.number, len(p.edits), sum(next(then) for _ in p.edits), sum(next(now) for _ in p.edits)) for p in others
    ]


def without(directory: Path, number: int) -> Model:
    """The base with all patches that are on but this one."""
    ledger = read(directory)
    _patch(ledger, number)
    others = tuple(p for p in ledger.patches if p.number != number)
    return _summed(directory, msgspec.structs.replace(ledger, patches=others)) or _base(directory, ledger)


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
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file", fix="a ledger is a directory: name one, or a new one")
    with writing(f"no ledger can be kept in {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        opened = (directory / LOCK).open("w")
    with opened as lock:
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
    _base(directory, ledger, base)
    return ledger


def _base(directory: Path, ledger: Ledger, ref: str = "") -> Model:
    """The model under the patches. MismatchError where it is not the one that they were made for."""
    now = refs.model(ref or ledger.base)
    if now.digest != ledger.base_digest:
        raise MismatchError(
            f"{directory} holds edits of another model",
            why=f"{now.ref} has digest {now.digest[:12]}, its base {ledger.base} had {ledger.base_digest[:12]}",
            fix="begin another ledger for this model, or put the base back",
        )
    return now


def _of_kind(directory: Path, ledger: Ledger, stack: Stack[Any]) -> Ledger:
    """The ledger, if what is made now can stand with what it has."""
    if not ledger.patches:
        return msgspec.structs.replace(ledger, memory=stack.method)
    if ledger.memory == stack.method:
        return ledger
    has = f"edits in the memory of {ledger.memory}" if ledger.memory else "changes of weights"
    new = f"edits in the memory of {stack.method}" if stack.method else "a change of weights"
    below = directory / HEAD if ledger.head else ledger.base
    over = f"begin another ledger over this one's model: `lfm edit add OTHER … --model {below}`"
    raise ConfigError(
        f"{directory} holds {has}; {new} cannot stand among them",
        why="what one writes the other reads, so that neither could come off without the other",
        fix=f"--by {ledger.memory}, or begin another ledger" if ledger.memory else over,
    )


def _allowed(
    directory: Path, ledger: Ledger, stack: Stack[Any], settings: Mapping[str, Any], edits: str | Sequence[Edit]
) -> None:
    """ConfigError or DataError for what would not be a patch of its own."""
    if settings.get("forget"):
        raise ConfigError("a ledger forgets by patches", fix=f"`lfm edit revert {directory} N`")
    if not stack.method:
        return
    known = {edit.prompt: (p.number, edit.new_object.strip()) for p in ledger.on for edit in p.edits}
    records = refs.records(edits)
    for place, edit in enumerate(records):
        if isinstance(edit, Edit) and edit.prompt in known:
            number, said = known[edit.prompt]
            does = "repeats" if said == edit.new_object.strip() else "contradicts"
            raise DataError(
                f"{where(records, place)} {does} patch {number}: {edit.prompt!r}",
                why=f"the memory answers {said!r} to it",
                fix=f"take that patch off first, `lfm edit revert {directory} {number}`, or leave this edit out",
            )


def _stack(ledger: Ledger) -> Stack[Any]:
    return stacks.of_method(ledger.memory) if ledger.memory else stacks.WEIGHTS


def _held_by(directory: Path, ledger: Ledger, patch: Patch) -> Any:
    return _stack(ledger).held(refs.model(str(directory / patch.place)))


def _emptied(directory: Path, ledger: Ledger) -> Model | None:
    """What goes on where all patches are off: a memory is of one place in the model, whatever comes and goes."""
    if not ledger.patches:
        return None
    stack = _stack(ledger)
    empty = stack.empty(_held_by(directory, ledger, ledger.patches[-1]))
    return None if empty is None else stack.over(_base(directory, ledger), empty, {})


def _summed(directory: Path, ledger: Ledger) -> Model | None:
    if not ledger.on:
        return None
    stack = _stack(ledger)
    whole = stack.whole([_held_by(directory, ledger, patch) for patch in ledger.on])
    return stack.over(_base(directory, ledger), whole, ledger.on[-1].config)


def _said(model: Model, edits: Sequence[Edit]) -> list[bool]:
    """Which edits greedy text shows."""
    from lfm.editing.cloze import said
    from lfm.editing.form import form_of
    from lfm.editing.outcome import saying, wanted

    if not edits or model.can(Text):
        return saying(model.ask(Text))(wanted(edits)) if edits else []
    module = model.ask(Gradients).module()
    return said(module, model.ask(Codec), wanted(edits), form_of(model, module))


def _kept(model: Model, records: Sequence[Any], done: RunRecord) -> tuple[Edit, ...]:
    """The edits that were made: all of them, or where some were left out those that are said."""
    edits = [edit for edit in records if isinstance(edit, Edit)]
    if not done.notes.get("skipped"):
        return tuple(edits)
    return tuple(edit for edit, said in zip(edits, _said(model, edits), strict=True) if said)


def _lost(before: Model, after: Model, edits: Sequence[Edit]) -> tuple[int, list[Edit]]:
    """How many edits greedy text shows before, and which of them not after."""
    then, now = (_said(model, edits) for model in (before, after))
    return sum(then), [edit for edit, said, says in zip(edits, then, now, strict=True) if said and not says]


def put(directory: Path, ledger: Ledger, held: Any, run: Path | None = None) -> Ledger:
    """Commit a ledger whose last patch is new: what it holds, with what is kept of its run."""
    last = ledger.patches[-1]

    def fill(into: Path) -> None:
        _stack(ledger).over(_base(directory, ledger), held, last.config).save(into)
        for name in KEPT:
            if run is not None and (run / name).exists():
                shutil.copyfile(run / name, into / name)

    _made(directory / last.place, fill)
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
    if summed is None:
        _base(directory, ledger)
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
