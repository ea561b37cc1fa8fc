"""Digests of files that have not changed are not computed again; whatever changes a file makes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lfm.tensors import digest, known
from lfm.tensors.files import open_tensors


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def aged(file: Path) -> None:
    """As if written a minute ago. (The time of change is the present one: what is settled is looked at through it.)"""
    past = file.stat().st_mtime - 60
    os.utime(file, (past, past))


def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are read from now on."""
    seen: list[str] = []
    plain = digest.blake3_of
    monkeypatch.setattr(digest, "blake3_of", lambda tensor: seen.append(tensor.name) or plain(tensor))
    return seen


def test_what_is_settled_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "SETTLED", -1.0)
    seen = read(monkeypatch)
    first = digest.digest_tensors(open_tensors(file))
    assert sorted(seen) == ["a", "b"]
    assert digest.digest_tensors(open_tensors(file)) == first and len(seen) == 2
    known.forget(file.parent)
    assert digest.digest_tensors(open_tensors(file)) == first and len(seen) == 4


def test_what_was_written_moments_ago_is_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = read(monkeypatch)
    for _ in range(2):
        digest.digest_tensors(open_tensors(file))
    assert len(seen) == 4


def test_other_bytes_in_the_same_place_are_noticed_though_the_time_of_writing_is_set_back(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "SETTLED", -1.0)
    aged(file)
    before, times = digest.digest_tensors(open_tensors(file)), file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_mtime_ns == times.st_mtime_ns and file.stat().st_ino == times.st_ino
    assert digest.digest_tensors(open_tensors(file)) != before


def test_a_spoiled_or_foreign_note_is_not_believed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "SETTLED", -1.0)
    whole = digest.digest_tensors(open_tensors(file))
    (note,) = (file.parent / "home" / "digests").iterdir()
    for spoiled in ("", "{}", "[]", note.read_text().replace('"file": "', '"file": "/other')):
        note.write_text(spoiled)
        assert digest.digest_tensors(open_tensors(file)) == whole


def test_without_a_home_it_is_computed_each_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "SETTLED", -1.0)
    (file.parent / "flat").write_text("a file")
    monkeypatch.setenv("LFM_HOME", str(file.parent / "flat"))
    assert digest.digest_tensors(open_tensors(file)) == digest.digest_tensors(open_tensors(file))
