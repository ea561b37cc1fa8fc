"""The plan of a prepared run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lfm.runs.plan import Plan
from lfm.runs.plan import plan as estimate

if TYPE_CHECKING:
    from lfm.runs.execute import Prepared


def plan(prepared: Prepared) -> Plan:
    """What the run would take on this machine; no weight is read."""
    order = prepared.order
    return estimate(
        order.id,
        prepared.listed.method,
        prepared.config,
        prepared.inputs,
        out=order.out,
        budget=order.budget,
        evals=tuple(prepared.evals.values()),
        most=order.memory,
    )
