"""What a run would take, said before it starts: access, time, memory, disk, queries, tokens, and what would not fit.

Nothing here reads a weight: the estimate rests on the method's Cost, on facts from headers, and on a short probe of
this machine (one matrix product, free memory, free disk).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import msgspec

from lfm.core.method import Cost, Inputs, Method, Sizes
from lfm.data import files
from lfm.report import words
from lfm.runs.machine import Machine, machine
from lfm.tensors.parallel import at_most, threads

EFFICIENCY = (0.1, 0.8)
"""Share of the matrix-product rate that training and inference reach, worst and best."""

STEP_SECONDS = (0.001, 0.03)
"""Fixed overhead of one sequential pass, best and worst: Python, kernel launches, the optimiser."""

QUERY_SECONDS = (0.002, 0.5)
"""One prompt sent to an endpoint, best (many in a request, on this machine) and worst."""

START_SECONDS = (2.0, 12.0)
"""Loading torch and transformers, opening models, saving and opening again: of every run, best and worst."""

BYTES_SECOND = (1e9, 1e8)
"""Reading, hashing and writing of weights, best and worst."""

PASSES = 4
"""How often the bytes of models go by: digest, use, save, verification."""

AT_ONCE = 8
"""Requests under way at once."""

HEADROOM = 300 * 2**20
"""Bytes that Python, torch and transformers take before any model: their own (RssAnon 295 MB, torch 2.13 on Linux).

The files that they map are another 100 MB of resident size, which the system takes back where it needs them.
"""

LIGHT = 60 * 10**6
"""The same where only numpy is loaded."""

MODULE = 8
"""Bytes a parameter while a module is opened to be measured: as it was stored, and in fp32."""


LIMIT = "--max-memory"
"""What a plan calls the memory that may be used."""

PLAIN = ("float64", "float32", "bfloat16", "float16")
"""Formats that are read without torch."""


@final
class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a run would take. seconds: from best to worst; lacks: what this machine or the budget cannot give.

    queries, tokens: of endpoints. here: questions to models that lie here, which no budget is spent on.
    """

    method: str
    access: dict[str, list[str]]
    device: str
    seconds: tuple[float, float]
    memory: int
    disk: int
    queries: int
    tokens: int
    here: int = 0
    lacks: tuple[str, ...] = ()
    threads: int = 0  # that merges may use; 0: all cores

    @property
    def fits(self) -> bool:
        return not self.lacks


def plan(
    id: str,
    method: Method[Any],
    config: Any,
    inputs: Inputs,
    *,
    out: Path,
    budget: tuple[int | None, int | None] = (None, None),
    evals: Sequence[Sequence[Any]] = (),
    on: Machine | None = None,
    most: int | None = None,
) -> Plan:
    """The plan of one run on checked inputs. budget: (queries, tokens), None: unlimited. evals: the records of each.

    most: bytes of memory that may be used; as many threads as keep to it.
    """
    sizes = files.sizes(inputs)
    access = {role: slot.asked for role, slot in method.models.items() if inputs.all(role)}
    asks = any(m.kind == "api" for given in inputs.models.values() for m in given)
    here = on or machine(out)
    reads = sum(f.bytes for facts in sizes.models.values() for f in facts)
    cost, count = _keeping_to(most, method, config, sizes)
    if method.disk is not None:
        cost = cost._replace(disk=method.disk(config, inputs))
    if asks and method.open is not None and method.gives == "model":
        cost = _asked_later(cost, sizes, evals)
    first = next((facts[0] for facts in sizes.models.values() if facts), None)
    if first is not None and not asks:  # what is measured is measured before and after
        measured = sum(files.amount(records).tokens for records in evals)
        memory = max(cost.memory, MODULE * first.parameters if measured else 0)
        cost = cost._replace(flops=cost.flops + 2 * 2.0 * first.parameters * measured, memory=memory)
    stored = all(m.kind == "checkpoint" and m.facts.dtype in PLAIN for given in inputs.models.values() for m in given)
    if not stored or any(map(len, evals)):
        cost = cost._replace(light=False)
    found = weigh(id, cost, here, access=access, budget=budget, asks=asks, reads=reads, allowed=most)
    return msgspec.structs.replace(found, threads=count)


def _asked_later(cost: Cost, sizes: Sizes, evals: Sequence[Sequence[Any]]) -> Cost:
    """With what a program over an endpoint is asked once it is made: to verify it, and to measure it."""
    from lfm.prompting.classifier import questions
    from lfm.runs.verification import PROBES

    more = (len(PROBES) + sum(map(len, evals))) * (cost.each or questions(sizes, {}))
    given = max(sizes.data.values(), key=lambda amount: amount.records, default=None)
    each = cost.tokens / cost.queries if cost.queries else given.tokens / max(given.records, 1) if given else 0
    return cost._replace(queries=cost.queries + more, tokens=cost.tokens + int(more * each))


def _keeping_to(most: int | None, method: Method[Any], config: Any, sizes: Sizes) -> tuple[Cost, int]:
    """The cost with as many threads as keep to `most` bytes, or with one; and how many those are, 0 for all."""
    if most is None:
        return method.cost(config, sizes), 0
    cost, count = Cost(), 1
    for count in range(threads(), 0, -1):
        with at_most(count):
            cost = method.cost(config, sizes)
        if cost.memory + (LIGHT if cost.light else HEADROOM) <= most:
            break
    return cost, count


def weigh(
    id: str,
    cost: Cost,
    on: Machine,
    *,
    access: Mapping[str, list[str]] | None = None,
    budget: tuple[int | None, int | None] = (None, None),
    asks: bool = False,
    reads: int = 0,
    allowed: int | None = None,
) -> Plan:
    """A cost on a machine: a range of seconds, and what would not fit. asks: whether any model is an endpoint.

    A model that lies here is asked nothing: its queries are part of the arithmetic. reads: bytes of the models.
    allowed: bytes of memory that may be used.
    """
    here = 0 if asks else int(cost.queries)
    if not asks:
        cost = cost._replace(queries=0, tokens=0)
    passed = PASSES * (reads + cost.disk)

    def lasts(efficiency: float, step: float, query: float, start: float, rate: float) -> float:
        work = cost.flops / (on.flops * efficiency) + cost.steps * step + cost.queries * query / AT_ONCE
        return start + work + passed / rate

    ends = zip(reversed(EFFICIENCY), STEP_SECONDS, QUERY_SECONDS, START_SECONDS, BYTES_SECOND)
    least, most = (lasts(*end) for end in ends)
    seconds = (least, most)
    memory = int(cost.memory) + (LIGHT if cost.light else HEADROOM)
    lacks = []
    if allowed is not None and memory > allowed:
        lacks.append(f"{LIMIT}: needs at least {words.size(memory)}, {words.size(allowed)} may be used")
    for name, needed, free in (("memory", memory, on.memory), ("disk", int(cost.disk), on.disk)):
        if needed > free:
            lacks.append(f"{name}: needs {words.size(needed)}, {words.size(free)} is free")
    for name, needed, limit in (("queries", cost.queries, budget[0]), ("tokens", cost.tokens, budget[1])):
        if limit is not None and needed > limit:
            lacks.append(f"{name}: needs about {needed}, the budget is {limit}")
    return Plan(
        method=id,
        access=dict(access or {}),
        device=on.device,
        seconds=seconds,
        memory=memory,
        disk=int(cost.disk),
        queries=int(cost.queries),
        tokens=int(cost.tokens),
        here=here,
        lacks=tuple(lacks),
    )
