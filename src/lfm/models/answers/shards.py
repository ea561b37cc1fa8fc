"""Answers on disk: shards that are only ever added to, each with an index of what lies where and what it sums to.

A shard is two files: NAME.bin, one run of bytes a question, and NAME.index, ENTRY for each. Bytes reach the disk before
the entries that tell of them: after a kill what lies past the last entry, and half an entry, is cut off, and nothing
before it is touched. What is read is held against its sum first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from xxhash import xxh3_64_intdigest

from lfm.core.errors import CorruptError
from lfm.core.heavy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHARD = 1 << 28
"""Bytes after which another shard begins."""

KEY = 16
"""Bytes of a question's digest."""

FIELDS = [("key", f"V{KEY}"), ("start", "<u8"), ("bytes", "<u4"), ("places", "<u4"), ("sum", "<u8")]
"""Of an entry: the question, where its bytes begin and how many there are, how many places they tell of, their XXH3."""

AGAIN = "restore it from where it came, or make the answers again"


def bin_of(directory: Path, number: int) -> Path:
    return directory / f"answers-{number:05}.bin"


def index_of(directory: Path, number: int) -> Path:
    return directory / f"answers-{number:05}.index"


def entries(file: Path) -> NDArray[Any]:
    """The index in a file, of which half an entry at the end is left out."""
    kind = np.dtype(FIELDS)
    raw = file.read_bytes()
    return np.frombuffer(raw[: len(raw) // kind.itemsize * kind.itemsize], kind)


@final
class Writer:
    """Adds to the shards in a directory, after what is whole there; `count` questions are."""

    def __init__(self, directory: Path, limit: int = SHARD) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._limit = directory, limit
        self.count = self._number = self._size = 0
        while index_of(directory, self._number).exists():
            kept = _mended(directory, self._number)
            self.count += len(kept)
            self._size = int(kept["start"][-1] + kept["bytes"][-1]) if len(kept) else 0
            if not index_of(directory, self._number + 1).exists():
                break
            self._number += 1

    def add(self, keys: Sequence[bytes], packed: Sequence[bytes], places: Sequence[int]) -> None:
        """One run of bytes a question; all of them lie on the disk when this returns."""
        rows = list(zip(keys, packed, places, strict=True))
        while rows:
            if self._size >= self._limit:
                self._number, self._size = self._number + 1, 0
            taken, start = [], self._size
            while rows and self._size < self._limit:
                key, content, count = rows.pop(0)
                taken.append((content, (np.void(key), self._size, len(content), count, xxh3_64_intdigest(content))))
                self._size += len(content)
            _append(bin_of(self._directory, self._number), start, b"".join(content for content, _ in taken))
            index = index_of(self._directory, self._number)
            held = np.array([entry for _, entry in taken], np.dtype(FIELDS)).tobytes()
            _append(index, index.stat().st_size if index.exists() else 0, held)
            self.count += len(taken)


def _append(file: Path, at: int, content: bytes) -> None:
    with file.open("r+b" if file.exists() else "w+b") as opened:
        opened.seek(at)
        opened.write(content)
        opened.truncate()
        opened.flush()
        os.fsync(opened.fileno())


def _mended(directory: Path, number: int) -> NDArray[Any]:
    """The entries of a shard whose bytes are there and right; from the first of the others on, all is cut off."""
    index, held = index_of(directory, number), bin_of(directory, number)
    found = entries(index)
    size = held.stat().st_size if held.exists() else 0
    good = len(found)
    held.touch()
    with held.open("rb") as opened:
        while good:  # all before it lay on the disk when it was written
            last = found[good - 1]
            opened.seek(int(last["start"]))
            whole = int(last["start"] + last["bytes"]) <= size
            if whole and xxh3_64_intdigest(opened.read(int(last["bytes"]))) == last["sum"]:
                break
            good -= 1
    ends = int(found["start"][good - 1] + found["bytes"][good - 1]) if good else 0
    for file, end in ((index, good * found.dtype.itemsize), (held, ends)):
        if file.stat().st_size != end:
            _append(file, end, b"")
    return found[:good]


@final
class Shards:
    """What lies in a directory, memory-mapped. CorruptError where a shard is not as long as its index says."""

    def __init__(self, directory: Path, count: int) -> None:
        self._maps: list[NDArray[Any]] = []
        parts = []
        for number in range(count):
            held, index = bin_of(directory, number), index_of(directory, number)
            for file in (held, index):
                if not file.is_file():
                    raise CorruptError(f"{file} is missing", why=f"{directory} has {count} shards", fix=AGAIN)
            found = entries(index)
            ends = int((found["start"] + found["bytes"]).max()) if len(found) else 0
            size = held.stat().st_size
            if size != ends or index.stat().st_size != found.nbytes:
                why = f"its index tells of {ends} bytes, it has {size}"
                raise CorruptError(f"{held} is torn", why=why, fix=AGAIN)
            self._maps.append(np.memmap(held, np.uint8, "r") if size else np.empty(0, np.uint8))
            parts.append(found)
        self.entries = np.concatenate(parts) if parts else np.empty(0, np.dtype(FIELDS))
        self._shard = np.repeat(np.arange(count), [len(part) for part in parts])
        self._directory = directory
        self._by_key: dict[bytes, int] | None = None

    def find(self, keys: Sequence[bytes]) -> NDArray[Any]:
        """The number of each key's entry; −1 where it has none."""
        if self._by_key is None:
            self._by_key = {key.tobytes(): number for number, key in enumerate(self.entries["key"])}
        return np.array([self._by_key.get(key, -1) for key in keys], np.int64)

    def read(self, number: int) -> memoryview:
        """An entry's bytes. CorruptError where they are not those that were written."""
        entry = self.entries[number]
        start = int(entry["start"])
        shard = int(self._shard[number])
        found = memoryview(self._maps[shard][start : start + int(entry["bytes"])])  # type: ignore[arg-type]
        if xxh3_64_intdigest(found) != entry["sum"]:
            raise CorruptError(
                f"{bin_of(self._directory, shard)} is damaged",
                why=f"bytes {start} to {start + len(found)} are not those that were written",
                fix=AGAIN,
            )
        return found
