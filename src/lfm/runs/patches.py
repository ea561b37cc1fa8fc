"""Edits as patches: each an artefact of its own over one base, in a ledger from which any of them comes off."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lfm.core import registry
from lfm.core.errors import ConfigError, CorruptError, DataError, EditError, UnfinishedError
from lfm.core.interfaces import Codec, Logits, Text
from lfm.core.model import Model
from lfm.data.files import where
from lfm.data.records import Edit
from lfm.runs import refs, stacks
from lfm.runs.committing import HEAD as HEAD
from lfm.runs.committing import HEADS, alone, base_of, commit, head_of, held_by, named, put, summed
from lfm.runs.committing import LEDGER as LEDGER
from lfm.runs.committing import Ledger as Ledger
from lfm.runs.committing import Patch as Patch
from lfm.runs.committing import read as read
from lfm.runs.directory import abandoned
from lfm.runs.execute import Order, made
from lfm.runs.run import Show, silent
from lfm.runs.stacks import Stack

if TYPE_CHECKING:
    from lfm.record import RunRecord

NEXT = ".next"

EARLIER = "earlier"
"""The role by which an editor is given what the ledger has of its subjects."""

USUAL = "edit.rome"
"""The editor where none is named."""


def model(directory: Path) -> Model:
    """The base with the patches that are on."""
    ledger = read(directory)
    base = base_of(directory, ledger)
    return head_of(directory, ledger, base) or summed(directory, ledger, base) or base


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
    text showed are shown after; DataError, before any work, where that is certain, or where nothing would be changed.
    agree is told of what was measured before the commit; what it raises, there is none. Killed, it resumes, unless
    other edits come first.
    """
    with alone(directory, begins=True):
        ledger, under = _begun(directory, base)
        by = by or ledger.memory or USUAL
        stack = stacks.of_method(by)
        ledger = _of_kind(directory, ledger, stack)
        if (settings or {}).get("forget"):
            raise ConfigError("a ledger forgets by patches", fix=f"`lfm edit revert {directory} N`")
        records = refs.records(edits, kind="edit")
        _agreeing(directory, ledger, records, recall)
        ledger = _mended(directory, ledger, under)
        says = str(directory / HEADS / ledger.head) if ledger.head else ledger.base
        _changing(directory, ledger, records, says)
        before = says if ledger.head else _emptied(directory, ledger, under)
        held = None if before is None else stack.held(refs.model(before))
        if stack.method and held is not None:
            settings = stacks.settled(by, settings or {}, ledger.patches[-1].config, held, under.facts.layers)
        standing = _standing(by, ledger, records, says, recall)
        order = Order(
            id=by,
            models=stack.models(ledger.base, before),
            data={**standing, **(data or {}), "edits": records},
            settings=settings or {},
            out=directory / NEXT,
            seed=seed,
            form=stack.form,
        )
        shutil.rmtree(order.out, ignore_errors=True)
        done = _ran(order, show, report)
        try:
            after = refs.model(str(order.out))
            show("asking the edits so far", 0, None)
            _recalled(ledger, refs.model(says), after, recall)
            if agree:
                agree(done)
            new = stack.beyond(held if ledger.head else None, stack.held(after))
            patch = _patch(ledger, order, done, stack.edits(new) or _kept(after, records, done))
            ledger = put(directory, msgspec.structs.replace(ledger, patches=(*ledger.patches, patch)), new, order.out)
        finally:
            shutil.rmtree(order.out, ignore_errors=True)
    return ledger.patches[-1]


def _patch(ledger: Ledger, order: Order, done: RunRecord, edits: tuple[Edit, ...]) -> Patch:
    """What a run made, as the ledger's next."""
    return Patch(
        number=max((p.number for p in ledger.patches), default=0) + 1,
        method=order.id,
        seed=order.seed,
        config=dict(done.config),
        edits=edits,
        measured={k: float(v) for k, v in done.notes.items() if isinstance(v, int | float)},
        made=done.started,
    )


def revert(directory: Path, number: int) -> Ledger:
    """Take a patch off: what is left is the sum of the others. It stays in the ledger, off."""
    with alone(directory):
        ledger = read(directory)
        found = named(ledger, number)
        if not found.on:
            raise ConfigError(f"patch {number} is off already")
        off = tuple(msgspec.structs.replace(p, on=False) if p is found else p for p in ledger.patches)
        return commit(directory, msgspec.structs.replace(ledger, patches=off))


def squash(directory: Path) -> Ledger:
    """Make one patch of those that are on, exactly; those that are off are forgotten."""
    with alone(directory):
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
        base = base_of(directory, ledger)
        held = ledger.stack.whole([held_by(directory, ledger, p, base) for p in ledger.on])
        return put(directory, msgspec.structs.replace(ledger, patches=(whole,)), held)


def said(model: Model, edits: Sequence[Edit]) -> list[bool]:
    """Which edits greedy text shows, or what a masked model fills in."""
    from lfm.editing.cloze import filled
    from lfm.editing.outcome import saying, wanted

    if not edits or model.can(Text):
        return saying(model.ask(Text))(wanted(edits)) if edits else []
    return filled(model.ask(Logits).logits, model.ask(Codec), wanted(edits))


def _begun(directory: Path, base: str) -> tuple[Ledger, Model]:
    """The ledger, or a new one, and the model under it."""
    if not (directory / LEDGER).exists():
        if not base:
            raise ConfigError(f"{directory} is no ledger yet", fix="name the model to edit: --model")
        under = refs.model(base)
        return Ledger(base=under.ref, base_digest=under.digest), under
    ledger = read(directory)
    return ledger, base_of(directory, ledger, base)


def _standing(by: str, ledger: Ledger, records: Sequence[Any], sum: str, recall: float) -> dict[str, Sequence[Edit]]:
    """Earlier edits of the same subjects that the model says, for an editor that refuses to lose any: the last of each
    prompt, none that is made again or otherwise. None where all of them may be lost."""
    from lfm.editing.sequence import near

    edits = [edit for edit in records if isinstance(edit, Edit)]
    own = {_plain(prompt) for edit in edits for prompt in (edit.prompt, *edit.paraphrases)}
    told = {_plain(edit.prompt): edit for patch in ledger.on for edit in patch.edits}
    rest = [edit for prompt, edit in told.items() if prompt not in own]
    found = near(rest, edits)
    if EARLIER not in registry.get(by).method.data or len(rest) - len(found) >= recall * len(told):
        return {}
    left = tuple(edit for edit, shown in zip(found, said(refs.model(sum), found), strict=True) if shown)
    return {EARLIER: left} if left else {}


def _ran(order: Order, show: Show, report: Callable[[Path], None] | None) -> RunRecord:
    try:
        return made(order, show=show, report=report)
    except UnfinishedError:  # what a killed command had begun of other edits
        abandoned(order.out)
        return made(order, show=show, report=report)


def _mended(directory: Path, ledger: Ledger, base: Model) -> Ledger:
    """The ledger with its sum on disk, made anew of its patches where it is gone or not what it was."""
    whole = not ledger.head or head_of(directory, ledger, base) is not None
    return ledger if whole else commit(directory, ledger, base)


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


def _agreeing(directory: Path, ledger: Ledger, records: Sequence[Any], recall: float) -> None:
    """DataError for an edit that contradicts earlier ones, where less than `recall` of them would be left; in a memory
    for any that does, and any that it has: it is not asked for what it answers already."""
    told: dict[str, list[tuple[Patch, Edit]]] = {}
    for patch in ledger.on:
        for edit in patch.edits:
            for prompt in dict.fromkeys(map(_plain, (edit.prompt, *edit.paraphrases))):
                told.setdefault(prompt, []).append((patch, edit))
    found: list[tuple[int, str, Patch, Edit]] = []
    for place, edit in enumerate(records):
        for prompt in map(_plain, (edit.prompt, *edit.paraphrases)) if isinstance(edit, Edit) else ():
            for patch, earlier in told.get(prompt, ()):
                own = [_plain(edit.prompt), _plain(earlier.prompt)]
                if edit.new_object.strip() != earlier.new_object.strip() and prompt in own:
                    found.append((place, "contradicts", patch, earlier))
                elif ledger.memory and own == [prompt, prompt]:
                    found.append((place, "repeats", patch, earlier))
    count = sum(len(patch.edits) for patch in ledger.on)
    lost = {(patch.number, earlier.prompt) for _, _, patch, earlier in found}
    if not found or (not ledger.memory and (count - len(lost)) / count >= recall):
        return
    place, does, patch, earlier = found[0]
    off = f"take that patch off first, `lfm edit revert {directory} {patch.number}`, or leave this edit out"
    says = "the memory answers" if ledger.memory else "by that patch the model says"
    raise DataError(
        f"{where(records, place)} {does} patch {patch.number}: {earlier.prompt!r}",
        why=f"{says} {earlier.new_object.strip()!r} to it",
        fix=off if ledger.memory else f"{off}, or allow it: --recall",
    )


def _changing(directory: Path, ledger: Ledger, records: Sequence[Any], sum: str) -> None:
    """DataError where there is nothing to change: patches of weights made all these edits, and the model says them."""
    of = {(_plain(edit.prompt), edit.new_object.strip()): patch for patch in ledger.on for edit in patch.edits}
    edits = [edit for edit in records if isinstance(edit, Edit)]
    those = [of.get((_plain(edit.prompt), edit.new_object.strip())) for edit in edits]
    if ledger.memory or not those or None in those or not all(said(refs.model(sum), edits)):
        return
    first, more = those[0], f", and so does all that follows it to {where(records, -1)}" if len(edits) > 1 else ""
    assert first is not None
    raise DataError(
        f"{where(records, 0)} repeats patch {first.number}: {edits[0].prompt!r}{more}",
        why=f"the model says {edits[0].new_object.strip()!r} to it already",
        fix=f"leave it out, or take that patch off first: `lfm edit revert {directory} {first.number}`",
    )


def _plain(prompt: str) -> str:
    return " ".join(prompt.split())


def _emptied(directory: Path, ledger: Ledger, base: Model) -> Model | None:
    """What goes on where all patches are off: a memory is of one place in the model, whatever comes and goes."""
    stack = ledger.stack
    for patch in reversed(ledger.patches if ledger.memory else ()):
        try:
            empty = stack.empty(held_by(directory, ledger, patch, base))
        except CorruptError:  # any of them tells it
            if patch is ledger.patches[0]:
                raise
            continue
        return None if empty is None else stack.over(base, empty, patch.config)
    return None


def _kept(model: Model, records: Sequence[Any], done: RunRecord) -> tuple[Edit, ...]:
    """The edits that were made: all of them, or where some were left out those that are said."""
    edits = [edit for edit in records if isinstance(edit, Edit)]
    if not done.notes.get("skipped"):
        return tuple(edits)
    return tuple(edit for edit, shown in zip(edits, said(model, edits), strict=True) if shown)


def _recalled(ledger: Ledger, before: Model, after: Model, recall: float) -> None:
    """EditError where less than `recall` of the earlier edits that are said before are said after."""
    shown, lost = _lost(before, after, [edit for patch in ledger.on for edit in patch.edits])
    if (shown - len(lost)) / max(1, shown) < recall and lost:
        raise EditError(
            f"{len(lost)} of {shown} earlier edits would be lost",
            why="; ".join(f"{edit.prompt!r} no longer says {edit.new_object!r}" for edit in lost[:3]),
            fix="make them again together with these, edit elsewhere, or allow it: --recall",
        )


def _lost(before: Model, after: Model, edits: Sequence[Edit]) -> tuple[int, list[Edit]]:
    """How many edits greedy text shows before, and which of them not after."""
    then, now = (said(model, edits) for model in (before, after))
    return sum(then), [edit for edit, was, says in zip(edits, then, now, strict=True) if was and not says]
