"""A budget of queries and tokens that is never exceeded: charged before a request leaves, settled by its answer."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

from lfm.core.errors import BudgetError
from lfm.models.store import Store

UNLIMITED = 2**62


@final
@dataclass(frozen=True)
class Budget:
    """The most that may be asked of an endpoint. None: no limit.

    queries: prompts sent, whether in one request or in many; a prompt that is sent again counts again, even where the
    server turned it away. tokens: of prompts and answers together; what a server turned away (4xx) took none, what
    broke (5xx, no answer in time) is charged at its worst case. path: the ledger's file; with it, processes share one
    budget and a run that resumes goes on from what is spent.
    """

    queries: int | None = None
    tokens: int | None = None
    path: Path | None = None


class Spent(NamedTuple):
    """What is charged so far, the worst case of requests under way included."""

    queries: int
    tokens: int


@final
class Meter:
    """The ledger of one budget: one row, changed by one conditional statement, so that no two callers overshoot.

    A process that dies with requests under way leaves their worst case charged: nobody knows what the server counted.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._opening = threading.Lock()
        self._opened: Store | None = None

    def spent(self) -> Spent:
        """What is charged so far."""
        return Spent(*self._store.run("SELECT queries, tokens FROM spent")[0])

    @property
    def _store(self) -> Store:
        with self._opening:  # its file is made when there is something to write: a run that asks nothing has none
            self._opened = self._opened or Store(
                self.budget.path,
                "CREATE TABLE IF NOT EXISTS spent (id INTEGER PRIMARY KEY CHECK (id = 1), queries INT, tokens INT)",
                "INSERT OR IGNORE INTO spent VALUES (1, 0, 0)",
                what="a budget ledger",
            )
            return self._opened

    def reserve(self, queries: int, tokens: int) -> None:
        """Charge the worst case of one request. BudgetError, and nothing charged, if it would not fit."""
        limits = [UNLIMITED if limit is None else limit for limit in (self.budget.queries, self.budget.tokens)]
        if self._store.run(
            "UPDATE spent SET queries = queries + ?1, tokens = tokens + ?2"
            " WHERE queries + ?1 <= ?3 AND tokens + ?2 <= ?4 RETURNING 1",
            (queries, tokens, *limits),
        ):
            return
        spent = self.spent()
        if spent.queries + queries > limits[0]:
            what = f"{spent.queries} of {limits[0]} queries are spent and the next request makes {queries}"
        else:
            what = f"{spent.tokens} of {limits[1]} tokens are spent and the next request may take {tokens}"
        raise BudgetError(
            what,
            why="a request goes out only if its worst case fits",
            fix="answers so far are kept and cost nothing again: run it again with a larger budget to go on"
            if spent.queries
            else "a larger budget: nothing is spent of this one",
        )

    def give_back(self, queries: int, tokens: int) -> None:
        """Lower the charge by what was reserved and not used."""
        if not queries and not tokens:
            return
        self._store.run("UPDATE spent SET queries = queries - ?, tokens = tokens - ?", (queries, tokens))
