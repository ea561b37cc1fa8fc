"""Answers kept on disk by the digest of the question, so that nothing is asked, or paid for, twice."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import msgspec

from lfm.core.errors import CorruptError
from lfm.core.home import home
from lfm.models.store import Store

_CANONICAL = msgspec.json.Encoder(order="deterministic")


def digest_of(question: Any) -> str:
    """sha256 of plain JSON values, whatever the order of their keys."""
    return hashlib.sha256(_CANONICAL.encode(question)).hexdigest()


def default_cache() -> Path:
    """Where answers lie unless told otherwise."""
    return home() / "api"


@final
class Cache:
    """Questions' digests and their answers. Threads and processes share it; the first answer to a question stays."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "answers.sqlite"
        self._store = Store(
            self.path,
            "CREATE TABLE IF NOT EXISTS answers (question TEXT PRIMARY KEY, answer BLOB NOT NULL)",
            what="a cache of answers",
        )

    def get(self, questions: Sequence[str]) -> dict[str, bytes]:
        """The kept answers among these questions."""
        found: dict[str, bytes] = {}
        for start in range(0, len(questions), 500):
            some = list(questions[start : start + 500])
            marks = ",".join("?" * len(some))
            rows = self._store.run(f"SELECT question, answer FROM answers WHERE question IN ({marks})", some)
            found.update((question, _whole(self.path, answer)) for question, answer in rows)
        return found

    def put(self, answers: Mapping[str, bytes]) -> None:
        self._store.run_many(
            "INSERT OR IGNORE INTO answers VALUES (?, ?)", [(q, zlib.compress(a, 1)) for q, a in answers.items()]
        )


def _whole(path: Path, packed: bytes) -> bytes:
    try:
        return zlib.decompress(packed)
    except zlib.error as error:
        raise CorruptError(f"{path} holds an answer that is damaged", why=str(error), fix="delete it") from None
