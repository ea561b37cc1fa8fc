"""A ledger of edits on disk: what it says, what lies beside it, and how it changes.

A directory: ledger.json, a directory for each patch (a plain PEFT adapter, or a program with a memory; its run and its
requests), and `head`, a link to what they make together. The base is never written. ledger.json is replaced in one
step, and all else follows from it: a command that was killed is done, or it never began. What else lies in a directory
is somebody's: no ledger begins where there is any, and only what bears a name and the form of ours is ever removed.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, final

import msgspec

from lfm.core.errors import ConfigError, CorruptError, LfmError, MismatchError, ModelError, OutputError
from lfm.core.model import Model
from lfm.core.writing import writing
from lfm.data.records import Edit
from lfm.models.adapter import CONFIG
from lfm.models.program import PROGRAM
from lfm.runs import refs, stacks
from lfm.runs.directory import settle
from lfm.runs.stacks import Stack
from lfm.tensors import known

LEDGER, HEAD, HEADS, LOCK, BEGUN = "ledger.json", "head", "heads", ".lock", ".begun"
"""BEGUN: in a directory that was empty when a ledger was begun there, until there is one: what lies beside it is ours.
It names the directories that were made for it."""

KEPT = ("run.json", "report.html", "README.md")
"""What is kept of the run that made a patch."""

SAVED = (CONFIG, PROGRAM)
"""What every artefact of a ledger has one of."""

NAMED, SHOWN = 16, 8
"""Letters of its digest by which a sum is named; patches that an error names."""


@final
class Patch(msgspec.Struct, frozen=True, kw_only=True):
    """One commit. measured: what its method noted; on: whether it is part of the sum now; digest: of its artefact, ""
    where none was kept."""

    number: int
    method: str
    seed: int
    config: dict[str, Any]
    edits: tuple[Edit, ...]
    measured: dict[str, float]
    made: str
    on: bool = True
    digest: str = ""

    @property
    def place(self) -> str:
        return f"{self.number:04d}"


@final
class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """Patches in the order in which they were made, over a base. head: the sum's directory, named by its digest, or ""
    for the base.

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

    @property
    def stack(self) -> Stack[Any]:
        return stacks.of_method(self.memory) if self.memory else stacks.WEIGHTS


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
        back = "put it back from a copy: each patch that lies beside it is whole, and loads by itself"
        raise CorruptError(f"{path} is not a ledger", why=str(error), fix=back) from None


def named(ledger: Ledger, number: int) -> Patch:
    """The patch of a number. ConfigError where there is none."""
    for patch in ledger.patches:
        if patch.number == number:
            return patch
    numbers = [str(patch.number) for patch in ledger.patches]
    if len(numbers) > SHOWN:
        numbers[SHOWN - 1 : -1] = ["…"]
    raise ConfigError(f"there is no patch {number}", fix=f"patches: {', '.join(numbers) or 'none'}")


@contextmanager
def alone(directory: Path, *, begins: bool = False) -> Iterator[None]:
    """One command at a time; what a killed one left is cleared away first, and what a failed one left after.

    begins: the directory is made, and goes again where no ledger comes to be in it. ModelError where there is none;
    OutputError, and nothing touched, where other things lie in its place.
    """
    if not begins or (directory / LEDGER).exists():
        read(directory)
    clear(directory)
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    with _locked(directory):
        try:
            clear(directory)
            with writing(f"{directory} cannot be written"):
                if not (directory / LEDGER).exists() and not (directory / BEGUN).exists():
                    made = "".join(f"{place.absolute()}\n" for place in missing)
                    (directory / BEGUN).write_text(made, encoding="utf-8")
                _tidy(directory)
            yield
        except Exception:
            with suppress(OSError, LfmError):
                _tidy(directory)
            raise
        finally:
            if not (directory / LEDGER).exists():
                _leave(directory)


def clear(directory: Path) -> None:
    """Raises where a ledger is not, and cannot begin: a file (ConfigError), or a directory with what is somebody's
    (OutputError)."""
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file", fix="a ledger is a directory: name one, or a new one")
    found = {place.name for place in directory.iterdir()} if directory.exists() else set[str]()
    if LEDGER in found:
        head = directory / HEAD
        if head.exists() and not head.is_symlink():
            why = f"{HEAD} is the link to what the patches make together; this was put in its place"
            raise OutputError(f"{head} is not the ledger's own", why=why, fix="move it elsewhere: the link comes back")
        return
    lock = directory / LOCK
    others = sorted(found - ({LOCK} if lock.is_file() and not lock.stat().st_size else set[str]()))
    if others and BEGUN not in found:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise OutputError(
            f"{directory} is no ledger, and is not empty",
            why=f"it holds {', '.join(others[:3])}{more}, and no {LEDGER}",
            fix="name a new directory for a ledger, or an empty one",
        )


def _locked(directory: Path) -> IO[str]:
    """The ledger's lock, held until it is closed."""
    with writing(f"no ledger can be kept in {directory}"):
        while True:
            directory.mkdir(parents=True, exist_ok=True)
            try:
                lock = (directory / LOCK).open("a")
            except FileNotFoundError:  # another command has just left nothing behind
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                raise ConfigError(f"{directory} is in use by another command", fix="wait for it to end") from None
            if (directory / LOCK).exists() and (directory / LOCK).stat().st_ino == os.fstat(lock.fileno()).st_ino:
                return lock
            lock.close()  # it was removed before it was ours: others would lock another


def _leave(directory: Path) -> None:
    """Nothing is left of a ledger that did not come to be, but the work of a run that can go on."""
    begun = directory / BEGUN
    if {place.name for place in directory.iterdir()} - {BEGUN, LOCK}:
        (directory / LOCK).unlink(missing_ok=True)
        return
    made = begun.read_text(encoding="utf-8").splitlines() if begun.exists() else []
    for mine in (begun, directory / LOCK):
        mine.unlink(missing_ok=True)
    for place in map(Path, made):
        with suppress(OSError):
            place.rmdir()


def _tidy(directory: Path) -> None:
    """`head` leads to the ledger's sum; other sums, and patches that the ledger does not have, are gone."""
    ledger = read(directory) if (directory / LEDGER).exists() else None
    if not ledger and not (directory / BEGUN).exists():
        return
    if ledger:
        _link(directory, ledger)
        (directory / BEGUN).unlink(missing_ok=True)
    numbers = {patch.number for patch in ledger.patches} if ledger else set[int]()
    for place in directory.iterdir():
        number = re.fullmatch(r"(?:(\d{4,})|\.\d{4,}\.partial)", place.name)
        if number and not (number[1] and (int(number[1]) in numbers or int(number[1]) > max(numbers, default=0) + 1)):
            _removed(place)
    heads = directory / HEADS
    for old in heads.iterdir() if heads.is_dir() else ():
        if ledger is None or old.name != ledger.head:
            _removed(old)
    if ledger is None or not ledger.head:
        with suppress(OSError):
            heads.rmdir()
    (directory / f"{LEDGER}.partial").unlink(missing_ok=True)


def _removed(place: Path) -> None:
    """A patch or a sum is gone, whole or half made; whatever else has its name stays."""
    if re.fullmatch(r"\..*\.partial", place.name) or any((place / name).exists() for name in SAVED):
        shutil.rmtree(place, ignore_errors=True)


def _link(directory: Path, ledger: Ledger) -> None:
    link, wanted = directory / HEAD, f"{HEADS}/{ledger.head}"
    if not ledger.head:
        link.unlink(missing_ok=True)
    elif not link.is_symlink() or str(link.readlink()) != wanted:
        partial = directory / f"{HEAD}.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(wanted)
        partial.replace(link)


def base_of(directory: Path, ledger: Ledger, ref: str = "") -> Model:
    """The model under the patches. MismatchError where it is not the one that they were made for."""
    now = refs.model(ref or ledger.base)
    if now.digest != ledger.base_digest:
        raise MismatchError(
            f"{directory} holds edits of another model",
            why=f"{now.ref} has digest {now.digest[:12]}, its base {ledger.base} had {ledger.base_digest[:12]}",
            fix="begin another ledger for this model, or put the base back",
        )
    return now


def held_by(directory: Path, ledger: Ledger, patch: Patch, base: Model) -> Any:
    """What a patch holds. CorruptError where it is not what was committed."""
    place = directory / patch.place
    off = f"take it off: `lfm edit revert {directory} {patch.number}`"
    if not patch.on:
        off = "leave it: it is off" + (f", and `lfm edit squash {directory}` forgets it" if ledger.on else "")
    off = f"put it back from a copy, or {off}"
    if not place.is_dir():
        raise CorruptError(f"{place} is gone", why=f"patch {patch.number} is in {directory / LEDGER}", fix=off)
    known.forget(place)  # its bytes are read, whatever its times say
    try:
        found = ledger.stack.opened(place, base)
        digest = found.digest
    except (ModelError, OSError) as error:
        raise CorruptError(f"{place} is not what was committed", why=str(error), fix=off) from None
    if patch.digest and digest != patch.digest:
        why = f"its digest is {digest[:12]}, the ledger has {patch.digest[:12]}"
        raise CorruptError(f"{place} is not what was committed", why=why, fix=off)
    return ledger.stack.held(found)


def summed(directory: Path, ledger: Ledger, base: Model) -> Model | None:
    """The base with the patches that are on, from the patches themselves; None where none is."""
    if not ledger.on:
        return None
    stack = ledger.stack
    whole = stack.whole([held_by(directory, ledger, patch, base) for patch in ledger.on])
    return stack.over(base, whole, ledger.on[-1].config)


def head_of(directory: Path, ledger: Ledger, base: Model) -> Model | None:
    """The sum as it was saved, where it is what was committed; None where it is not, or there is none."""
    place = directory / HEADS / ledger.head
    if not ledger.head or not place.is_dir():
        return None
    known.forget(place)
    try:
        found = ledger.stack.opened(place, base)
        return found if found.digest[:NAMED] == ledger.head else None
    except (LfmError, OSError):
        return None


def put(directory: Path, ledger: Ledger, held: Any, run: Path | None = None) -> Ledger:
    """Commit a ledger whose last patch is new: what it holds, with what is kept of its run.

    The others are not read again: their sum is.
    """
    last, base, stack = ledger.patches[-1], base_of(directory, ledger), ledger.stack
    made = stack.over(base, held, last.config)

    def fill(into: Path) -> None:
        made.save(into)
        for name in KEPT:
            if run is not None and (run / name).exists():
                shutil.copyfile(run / name, into / name)

    with _unchanged(directory):
        _made(directory / last.place, fill)
    last = msgspec.structs.replace(last, digest=made.digest)
    ledger = msgspec.structs.replace(ledger, patches=(*ledger.patches[:-1], last))
    others = [patch for patch in ledger.on if patch is not last]
    before = head_of(directory, ledger, base) if others else None
    if others and before is None:
        return commit(directory, ledger, base)
    whole = stack.whole([stack.held(before), held]) if before else held
    return _replaced(directory, ledger, base, stack.over(base, whole, last.config))


def commit(directory: Path, ledger: Ledger, base: Model | None = None) -> Ledger:
    """The ledger as it is from now on, its sum made of its patches."""
    base = base or base_of(directory, ledger)
    return _replaced(directory, ledger, base, summed(directory, ledger, base))


def _replaced(directory: Path, ledger: Ledger, base: Model, sum: Model | None) -> Ledger:
    head = sum.digest[:NAMED] if sum else ""
    done = msgspec.structs.replace(ledger, head=head)
    with _unchanged(directory):
        if sum and head_of(directory, done, base) is None:
            _made(directory / HEADS / head, sum.save)
        partial = directory / f"{LEDGER}.partial"
        with partial.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(done), indent=1) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(directory / LEDGER)
    with writing(f"{directory} is changed, but {HEAD} cannot be linked: the next command does that"):
        _tidy(directory)
    return done


def _unchanged(directory: Path) -> AbstractContextManager[None]:
    return writing(f"{directory} cannot be written, and is as it was")


def _made(place: Path, fill: Callable[[Path], object]) -> None:
    """A directory with what fill writes, whole or not at all."""
    partial = place.with_name(f".{place.name}.partial")
    for leftover in (partial, place):
        _removed(leftover)
    if place.is_dir() and any(place.iterdir()):
        raise OutputError(f"{place} is in the way", why="no patch or sum of this ledger lies there", fix="move it away")
    partial.mkdir(parents=True)
    fill(partial)
    settle(partial)
    partial.rename(place)
