"""A ledger on disk: each patch is held to its digest, the sum comes back of the patches, and nothing is left behind."""

from __future__ import annotations

import errno
import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from lfm import runs
from lfm.cli import converse, run
from lfm.core.errors import ConfigError, CorruptError, DataError, ModelError, OutputError, VerifyError
from lfm.data.files import write
from lfm.data.records import Edit
from lfm.models import load
from lfm.runs import committing, interference, patches
from runs.ledgers import change, grown, patch

QUICK = {"layer": 0, "prefixes": 3, "tokens": 200, "reach": 10.0, "steps": 60, "collapse": 100.0, "accept": 0.25}
FACT = Edit(subject="Ada Ashby", relation="named after", object="in", new_object="cat", prompt="Here lives Ada Ashby")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base"
    tiny.causal(path)
    return path


def rot(place: Path) -> None:
    """One byte of its last tensor is another, and its times tell nothing of it."""
    import os

    file = place / "adapter_model.safetensors"
    stat, told = file.stat(), bytearray(file.read_bytes())
    told[-2] ^= 1
    file.write_bytes(told)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def everything(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file() and p.name != ".lock"
    }


def test_a_byte_that_rotted_in_a_patch_is_seen_by_all_that_use_it(base: Path, tmp_path: Path) -> None:
    led = tmp_path / "led"
    grown(led, base, 3)
    rot(led / "0002")
    then = everything(led)
    for act in (
        lambda: patches.revert(led, 1),
        lambda: patches.squash(led),
        lambda: interference.beside(led, 2).moved,
        lambda: interference.beside(led, 1).together,
        lambda: runs.verify(led / "0002"),
        lambda: runs.verify(led),
    ):
        with pytest.raises(CorruptError, match="0002 is not what was committed") as caught:
            act()
        assert f"edit revert {led} 2" in caught.value.fix
    assert everything(led) == then
    patches.revert(led, 2)  # what it holds is not needed to take it off
    assert patches.model(led).digest == load(led / "head").digest != load(base).digest
    header = (led / "0003" / "adapter_model.safetensors").read_bytes()
    (led / "0003" / "adapter_model.safetensors").write_bytes(header[:-5])
    with pytest.raises(CorruptError, match="0003 is not what was committed"):
        patches.revert(led, 1)
    (led / "0003" / "adapter_model.safetensors").unlink()
    with pytest.raises(CorruptError, match="0003 is not what was committed"):
        patches.revert(led, 1)
    shutil.rmtree(led / "0003")
    with pytest.raises(CorruptError, match="0003 is gone"):
        patches.revert(led, 1)


@pytest.mark.parametrize("harm", [lambda led: shutil.rmtree(led / "heads"), lambda led: rot(led / "head")])
def test_a_sum_that_is_gone_or_rotted_is_made_anew_of_the_patches(
    harm: Callable[[Path], None], base: Path, tmp_path: Path
) -> None:
    led = tmp_path / "led"
    grown(led, base, 2)
    then = patches.model(led).digest
    harm(led)
    assert patches.model(led).digest == then
    patches.add(led, (FACT,), settings=QUICK)
    made = patches.model(led).digest
    assert load(led / "head").digest == made != then
    patches.revert(led, 3)
    assert load(led / "head").digest == then


def test_patches_and_their_sum_can_be_verified_and_say_how_they_come_off(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    led = tmp_path / "led"
    grown(led, base, 2)
    patches.add(led, (FACT,), settings=QUICK)
    for place, told in (
        ("0003", "1 patch, by digest"),
        ("head", "the sum of the patches, by digest"),
        (".", "3 patches and their sum, by digest"),
    ):
        assert run(["verify", str(led / place)]) == 0
        assert told in " ".join(capsys.readouterr().out.split())
    rot(led / "head")
    for place in (led / "head", led):
        with pytest.raises(VerifyError, match="is not the sum that was committed"):
            runs.verify(place)
    for place, fix in ((led / "0003", f"edit revert {led} 3"), (led / "head", f"edit revert {led} N")):
        with pytest.raises(OutputError, match="of a ledger of edits") as caught:
            runs.undo(place, tmp_path / "out")
        assert fix in caught.value.fix and not (tmp_path / "out").exists()


def test_a_run_beside_somebody_else_s_ledger_json_is_a_run(base: Path, tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text("[1, 2]")
    order = runs.Order(
        id="edit.rome",
        models={"model": (base,)},
        data={"edits": (FACT,)},
        settings=QUICK,
        out=tmp_path / "run",
        form="adapter",
    )
    made = runs.execute(order)
    assert runs.verify(tmp_path / "run").quantity == made.verified.quantity
    assert runs.undo(tmp_path / "run", tmp_path / "before") == load(base).digest


def test_a_head_that_cannot_be_linked_is_linked_by_the_next_command(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    led = tmp_path / "led"
    grown(led, base, 3)

    def refused(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no")

    with monkeypatch.context() as full, pytest.raises(OutputError, match="led is changed, but head cannot be linked"):
        full.setattr(Path, "symlink_to", refused)
        patches.revert(led, 1)
    assert [p.on for p in patches.read(led).patches] == [False, True, True]
    with pytest.raises(ConfigError, match="off already"):
        patches.revert(led, 1)
    assert load(led / "head").digest == patches.model(led).digest


def test_a_disk_that_refuses_the_first_patch_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.name == ".0001.partial":
            raise OSError(errno.ENOSPC, "no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OutputError, match="led cannot be written, and is as it was") as caught:
        patches.add(tmp_path / "led", (FACT,), base=str(base), settings=QUICK)
    assert "free some space" in caught.value.fix and not (tmp_path / "led").exists()


def test_commits_read_no_other_patch(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch that goes on is added to the sum: the time it takes does not grow with all that were opened before."""
    led = tmp_path / "led"
    grown(led, base, 3)
    opened: list[int] = []
    held_by = committing.held_by
    monkeypatch.setattr(committing, "held_by", lambda *given: (opened.append(given[2].number), held_by(*given))[1])
    ledger = patches.read(led)
    more = committing.Ledger(base=ledger.base, base_digest=ledger.base_digest, patches=(*ledger.patches, patch(4)))
    committing.put(led, more.__class__(**{**_fields(more), "head": ledger.head}), change(base, 4))
    assert opened == []
    sum = patches.model(led).digest
    shutil.rmtree(led / "heads")
    assert patches.model(led).digest == sum and opened == [1, 2, 3, 4]


def _fields(ledger: committing.Ledger) -> dict[str, object]:
    return {name: getattr(ledger, name) for name in ledger.__struct_fields__}


def test_what_a_killed_squash_left_is_cleared_away_by_the_next_command(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    led = tmp_path / "led"
    grown(led, base, 3)

    class Killed(BaseException):
        pass

    def dies(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as before, pytest.raises(Killed):
        before.setattr(committing, "_replaced", dies)
        patches.squash(led)
    assert (led / "0004").exists() and [p.number for p in patches.read(led).patches] == [1, 2, 3]
    patches.revert(led, 3)
    assert sorted(p.name for p in led.iterdir()) == [".lock", "0001", "0002", "0003", "head", "heads", "ledger.json"]
    calls = iter((committing._tidy, dies))
    with monkeypatch.context() as after, pytest.raises(Killed):
        after.setattr(committing, "_tidy", lambda *given: next(calls)(*given))
        patches.squash(led)
    assert [p.number for p in patches.read(led).patches] == [4] and (led / "0001").exists()
    patches.revert(led, 4)
    assert sorted(p.name for p in led.iterdir()) == [".lock", "0004", "ledger.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("act", [lambda led: patches.revert(led, 1), patches.squash])
def test_where_the_disk_refuses_a_ledger_is_as_it_was(
    act: Callable[[Path], object], code: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    led = tmp_path / "led"
    grown(led, base, 2)
    then, rename = everything(led), Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial") and self.is_dir():
            raise OSError(code, "no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OutputError, match="led cannot be written, and is as it was"):
        act(led)
    assert everything(led) == then


def test_a_ledger_that_was_refused_leaves_no_directory_nor_do_commands_where_there_is_none(
    base: Path, tmp_path: Path
) -> None:
    deep = tmp_path / "a" / "b" / "led"
    for act in (lambda: patches.revert(deep, 1), lambda: patches.squash(deep)):
        with pytest.raises(ModelError, match="is no ledger of edits"):
            act()
        assert not (tmp_path / "a").exists()
    with pytest.raises(ConfigError, match="is no ledger yet"):
        patches.add(deep, (FACT,))
    assert not (tmp_path / "a").exists()


def test_a_lock_that_another_command_removed_as_it_left_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it the other was done with it: what is held then nobody else sees."""
    led, flock, removed = tmp_path / "led", fcntl.flock, list[Path]()

    def late(lock: object, how: int) -> None:
        if not removed:
            removed.append(led / ".lock")
            removed[0].unlink()
        flock(lock, how)  # type: ignore[arg-type]

    monkeypatch.setattr(committing.fcntl, "flock", late)
    with committing.alone(led, begins=True):
        assert removed and removed[0].exists()
        with pytest.raises(ConfigError, match="in use by another"), committing.alone(led, begins=True):
            raise AssertionError("two had it")
    assert not led.exists()


def test_a_killed_command_s_edits_make_way_for_others(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    led = tmp_path / "led"
    write([FACT], tmp_path / "0.jsonl")

    def stops(label: str, at: int, total: int | None) -> None:
        if label == "verifying":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patches.add(led, (FACT,), base=str(base), settings=QUICK, seed=1, show=stops)
    left = led / "..next.lfm"
    assert any(path.name not in ("lock", "key") for path in left.iterdir())
    patches.add(led, str(tmp_path / "0.jsonl"), base=str(base), settings=QUICK)
    assert not left.exists() and [p.seed for p in patches.read(led).patches] == [0]


def test_the_edits_are_read_once_and_where_they_lie_is_told(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    led, file = tmp_path / "led", tmp_path / "0.jsonl"
    write([FACT], file)
    done = patches.add(led, str(file), base=str(base), settings=QUICK, agree=lambda done: file.unlink())
    assert done.edits == (FACT,)
    assert runs.read(led / "0001").data[0].ref == str(file)
    index = tmp_path / "home" / "ledger.jsonl"  # where runs are found again: what is gone by now is not in it
    assert not index.exists() or ".next" not in index.read_text()


def test_a_role_that_is_given_twice_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write([FACT], tmp_path / "0.jsonl")
    given = ["edit", "add", str(tmp_path / "led"), str(tmp_path / "0.jsonl"), "--model", str(base)]
    for more in (["edits=x.jsonl"], ["text=x.txt", "--text", "y.txt"], ["text=x.txt", "text=y.txt"]):
        assert run([*given, *more]) == 2
        assert "is given twice" in capsys.readouterr().err
    assert not (tmp_path / "led").exists()


def test_an_off_patch_that_is_gone_is_not_to_be_taken_off(base: Path, tmp_path: Path) -> None:
    led = tmp_path / "led"
    grown(led, base, 2)
    patches.revert(led, 1)
    shutil.rmtree(led / "0001")
    for act in (lambda: runs.verify(led), lambda: interference.beside(led, 1)):
        with pytest.raises(CorruptError, match="0001 is gone") as caught:
            act()
        assert "edit squash" in caught.value.fix and "revert" not in caught.value.fix
    patches.squash(led)
    assert runs.verify(led).quantity == "weight"
    patches.revert(led, 3)
    shutil.rmtree(led / "0003")
    with pytest.raises(CorruptError, match="0003 is gone") as caught:
        runs.verify(led)
    assert caught.value.fix == "put it back from a copy, or leave it: it is off"
    (led / "ledger.json").write_text("{")
    with pytest.raises(CorruptError, match="is not a ledger") as caught:
        patches.squash(led)
    assert "from a copy" in caught.value.fix


def test_what_the_ledger_has_already_is_told_before_any_work(base: Path, tmp_path: Path) -> None:
    """Not where the model no longer says it, nor beside an edit that is new."""
    import msgspec

    led = tmp_path / "led"
    other = msgspec.structs.replace(FACT, prompt="There lives Ada Ashby", new_object="dog")
    first = patches.add(led, (FACT,), base=str(base), settings=QUICK)
    then, shown = everything(led), list[str]()
    spaced = msgspec.structs.replace(FACT, new_object=" cat", neighbours=(("From the mountain", "x"),))
    with pytest.raises(DataError, match="edit 1 repeats patch 1: 'Here lives Ada Ashby'") as caught:
        patches.add(led, (spaced,), settings=QUICK, show=lambda label, *_: shown.append(label))
    assert "edit revert" in caught.value.fix and "says 'cat'" in caught.value.why
    assert shown == [] and everything(led) == then
    patches.add(led, (FACT, other), settings=QUICK | {"on_failure": "skip"}, recall=0.0)
    patches.revert(led, 2)
    patches.revert(led, first.number)
    patches.add(led, (FACT,), settings=QUICK)
    assert [p.on for p in patches.read(led).patches] == [False, False, True]


def test_what_contradicts_an_earlier_patch_is_told_before_any_work(base: Path, tmp_path: Path) -> None:
    import msgspec

    from lfm.core.errors import DataError

    led = tmp_path / "led"
    ledger = grown_with(led, base, (FACT,))
    other = msgspec.structs.replace(FACT, new_object="dog")
    told = msgspec.structs.replace(FACT, prompt="There lives Ada Ashby", paraphrases=(FACT.prompt,), new_object="dog")
    shown: list[str] = []
    for edit in (other, told):
        with pytest.raises(DataError, match="contradicts patch 1: 'Here lives Ada Ashby'") as caught:
            patches.add(led, (edit,), settings=QUICK, show=lambda label, *_: shown.append(label))
        assert "--recall" in caught.value.fix
    assert shown == [] and patches.read(led) == ledger
    patches.add(led, (other,), settings=QUICK, recall=0.0)  # allowed
    assert len(patches.read(led).patches) == 2


def grown_with(led: Path, base: Path, edits: tuple[Edit, ...]) -> committing.Ledger:
    import msgspec

    led.mkdir()
    ledger = committing.Ledger(base=str(base), base_digest=load(base).digest)
    ledger = msgspec.structs.replace(ledger, patches=(msgspec.structs.replace(patch(1), edits=edits),))
    return committing.put(led, ledger, change(base, 1))


def yours(directory: Path) -> dict[str, bytes]:
    """Somebody's files, of names that a ledger has too."""
    for name in ("heads/photos/a.jpg", "0001/a.txt", "head", ".lock"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_no_ledger_begins_among_other_things_and_none_of_them_is_touched(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    led = tmp_path / "d"
    then = yours(led)
    write([FACT], tmp_path / "0.jsonl")
    for edits in ("0.jsonl", "nosuch.jsonl"):
        assert run(["edit", "add", str(led), str(tmp_path / edits), "--model", str(base)]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "d is no ledger, and is not empty" in told and ".lock, 0001, head and 1 more" in told
        assert everything(led) | {".lock": (led / ".lock").read_bytes()} == then
    given = converse.Session(led, str(base), "", QUICK, None, 0, 1.0, ())
    with pytest.raises(OutputError, match="is not empty"):
        converse.converse(given, lambda _: pytest.fail("asked"))
    assert {str(p.relative_to(led)): p.read_bytes() for p in led.rglob("*") if p.is_file()} == then
    (tmp_path / "empty").mkdir()
    assert run(["edit", "add", str(tmp_path / "empty"), "nosuch.jsonl", "--model", str(base)]) == 2
    assert list((tmp_path / "empty").iterdir()) == []
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "ledger.json").write_text("[1, 2]")
    with pytest.raises(CorruptError, match="is not a ledger"):
        patches.add(tmp_path / "other", (FACT,), base=str(base))
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["ledger.json"]


def test_a_ledger_removes_only_its_own(base: Path, tmp_path: Path) -> None:
    led = tmp_path / "led"
    grown(led, base, 2)
    for name in ("heads/photos/a.jpg", "0003/a.txt", "0000/a.txt"):
        (led / name).parent.mkdir(parents=True)
        (led / name).write_text(name)
    shutil.copytree(led / "0002", led / "0004")  # but these two are patches that it does not have
    shutil.copytree(led / "0002", led / "heads" / "old")
    patches.revert(led, 1)
    shutil.copytree(led / "0002", led / "00000")
    patches.revert(led, 2)
    assert not (led / "heads" / "old").exists() and not (led / "00000").exists()
    assert all((led / name).read_text() == name for name in ("heads/photos/a.jpg", "0003/a.txt", "0000/a.txt"))
    shutil.rmtree(led / "0004")
    with pytest.raises(OutputError, match="0003 is in the way"):
        patches.add(led, (FACT,), settings=QUICK)
    assert (led / "0003" / "a.txt").exists() and len(patches.read(led).patches) == 2
    (led / "head").write_text("mine")
    with pytest.raises(OutputError, match="head is not the ledger's own"):
        patches.squash(led)
    assert (led / "head").read_text() == "mine"


def test_what_a_killed_first_add_left_is_known_by_its_mark(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    led = tmp_path / "a" / "led"

    class Killed(BaseException):
        pass

    def dies(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as before, pytest.raises(Killed):
        before.setattr(committing, "_replaced", dies)
        patches.add(led, (FACT,), base=str(base), settings=QUICK)
    assert (led / "0001").is_dir() and (led / ".begun").is_file()
    with pytest.raises(DataError, match="no data file"):
        patches.add(led, "nosuch.jsonl", base=str(base))
    assert not (tmp_path / "a").exists()  # as it was before the first
    patches.add(led, (FACT,), base=str(base), settings=QUICK)
    assert sorted(p.name for p in led.iterdir()) == [".lock", "0001", "head", "heads", "ledger.json"]
    (led / "ledger.json").unlink()  # and what is lost can be put back
    with pytest.raises(OutputError, match="led is no ledger, and is not empty"):
        patches.add(led, (FACT,), base=str(base), settings=QUICK)
    assert (led / "0001" / "adapter_model.safetensors").exists()
