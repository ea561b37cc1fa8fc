"""One sqlite file that threads and processes share."""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, final

from lfm.core.errors import CorruptError, OutputError


@final
class Store:
    """Statements one at a time, each atomic and each outliving a kill of this process. path None: memory only."""

    def __init__(self, path: Path | None, *statements: str, what: str) -> None:
        self.path, self._what = path, what
        self._lock = threading.Lock()
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"{path.parent} cannot be made", why=str(error)) from None
        self._connect()
        for statement in statements:
            self.run(statement)

    def run(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows that one statement gives."""
        with self._lock:
            return self._try(lambda: self._connection.execute(statement, values).fetchall())

    def run_many(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """One statement for each row, all of them or none."""
        rows = list(rows)
        if len(rows) == 1:  # a statement is all or none by itself
            self.run(statement, rows[0])
            return

        def all_or_none() -> None:
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                self._connection.executemany(statement, rows)

        with self._lock:
            self._try(all_or_none)

    def _connect(self) -> None:
        def opened() -> sqlite3.Connection:
            where = ":memory:" if self.path is None else self.path
            connection = sqlite3.connect(where, timeout=60, check_same_thread=False, isolation_level=None)
            weakref.finalize(self, connection.close)
            if self.path is not None:
                # Without a write-ahead log every statement would wait for the disk, twice a request.
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=NORMAL")
            return connection

        self._connection, self._process = self._try(opened), os.getpid()

    def _try(self, action: Any) -> Any:
        try:
            if getattr(self, "_process", os.getpid()) != os.getpid() and self.path is not None:
                self._connect()  # a sqlite connection must not cross a fork
            return action()
        except sqlite3.OperationalError as error:
            raise OutputError(f"{self.path} cannot be used", why=str(error)) from None
        except sqlite3.DatabaseError as error:
            fix = "delete it, or name another directory"
            raise CorruptError(f"{self.path} is not {self._what}", why=str(error), fix=fix) from None
