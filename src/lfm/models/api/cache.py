"""Answers kept on disk by the digest of the question, so that nothing is asked, or paid for, twice."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, final

import msgspec

from lfm.core.errors import CorruptError

_CANONICAL = msgspec.json.Encoder(order="deterministic")


def digest_of(question: Any) -> str:
    """sha256 of plain JSON values, independent of the order of keys."""
    return hashlib.sha256(_CANONICAL.encode(question)).hexdigest()


def default_cache() -> Path:
    """Where answers lie unless told otherwise: $LFM_CACHE/api, or the user's cache directory."""
    home = os.environ.get("LFM_CACHE")
    if home:
        return Path(home) / "api"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lfm" / "api"


@final
class Cache:
    """One sqlite file. Several threads and processes may read and write it at once; the first answer to a question stays."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "answers.sqlite"
        with self._open() as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS answers (question TEXT PRIMARY KEY, answer BLOB NOT NULL)")

    def get(self, questions: Sequence[str]) -> dict[str, bytes]:
        """The kept answers among these questions' digests."""
        found: dict[str, bytes] = {}
        with self._open() as connection:
            for start in range(0, len(questions), 500):
                some = list(questions[start : start + 500])
                rows = connection.execute(
                    f"SELECT question, answer FROM answers WHERE question IN ({','.join('?' * len(some))})", some
                )
                found.update((question, bytes(answer)) for question, answer in rows)
        return found

    def put(self, answers: dict[str, bytes]) -> None:
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", list(answers.items()))
            connection.execute("COMMIT")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=60, isolation_level=None)) as connection:
                yield connection
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise CorruptError(f"{self.path} is not a cache of answers", why=str(error), fix="delete it") from None
