"""A budget of queries and tokens that is never exceeded: reserved before a request goes out, settled when it is answered."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

from lfm.core.errors import BudgetError, CorruptError


@final
@dataclass(frozen=True)
class Budget:
    """The most that may be asked of an endpoint. None: no limit.

    queries: prompts sent, whether in one request or in many. tokens: of prompts and answers together.
    path: the ledger's file; with it, processes share one budget and a run that resumes goes on from what is spent.
    """

    queries: int | None = None
    tokens: int | None = None
    path: Path | None = None


class Spent(NamedTuple):
    """What is charged so far, reservations of requests under way (or of a process that was killed) included."""

    queries: int
    tokens: int


@final
class Meter:
    """The ledger of one budget: a row in sqlite, changed under its write lock, so that no two callers overshoot.

    What is reserved is on disk before the request leaves. A process that dies with requests under way leaves their
    worst case charged: nobody knows whether the server counted them.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._lock = threading.Lock()
        where = ":memory:"
        if budget.path is not None:
            budget.path.parent.mkdir(parents=True, exist_ok=True)
            where = str(budget.path)
        self._where = where
        self._kept = (
            sqlite3.connect(where, check_same_thread=False, isolation_level=None) if where == ":memory:" else None
        )
        try:
            self._run(
                "CREATE TABLE IF NOT EXISTS spent (id INTEGER PRIMARY KEY CHECK (id = 1), queries INT, tokens INT)"
            )
            self._run("INSERT OR IGNORE INTO spent VALUES (1, 0, 0)")
        except sqlite3.DatabaseError as error:
            raise CorruptError(
                f"{where} is not a budget ledger", why=str(error), fix="move it away to start counting from zero"
            ) from None

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()

    def spent(self) -> Spent:
        return Spent(*self._run("SELECT queries, tokens FROM spent"))

    def reserve(self, queries: int, tokens: int) -> None:
        """Charge the worst case of one request. BudgetError, and nothing charged, if it would not fit."""
        most_queries = self.budget.queries if self.budget.queries is not None else 2**62
        most_tokens = self.budget.tokens if self.budget.tokens is not None else 2**62
        done = self._run(
            "UPDATE spent SET queries = queries + ?1, tokens = tokens + ?2"
            " WHERE queries + ?1 <= ?3 AND tokens + ?2 <= ?4 RETURNING 1",
            (queries, tokens, most_queries, most_tokens),
        )
        if done:
            return
        spent = self.spent()
        if spent.queries + queries > most_queries:
            what = f"{spent.queries} of {most_queries} queries are spent and the next request makes {queries}"
        else:
            what = f"{spent.tokens} of {most_tokens} tokens are spent and the next request may take {tokens}"
        raise BudgetError(
            what,
            why="a request goes out only if its worst case fits",
            fix="answers so far are kept and cost nothing again: run it again with a larger budget to go on",
        )

    def give_back(self, queries: int, tokens: int) -> None:
        """Lower the charge by what a request was reserved but did not use."""
        self._run("UPDATE spent SET queries = queries - ?, tokens = tokens - ?", (queries, tokens))

    def _run(self, statement: str, values: tuple[int, ...] = ()) -> tuple[int, ...]:
        with self._lock:
            if self._kept is not None:
                return self._kept.execute(statement, values).fetchone() or ()
            # One connection a statement: they do not survive a fork, and the file may lie in a run that is moved.
            with closing(sqlite3.connect(self._where, timeout=60, isolation_level=None)) as connection:
                return connection.execute(statement, values).fetchone() or ()
