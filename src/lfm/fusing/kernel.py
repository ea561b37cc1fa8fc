"""The source of a kernel: a formula, written out for a number of models, within a loop over blocks.

Four loops have all rules in them. `map`: each element's result is stored. `sum`: results are added up, group by group.
`count` and `near`: how many results have each value of a digit of their magnitude, for thresholds. A group is a run of
`width` elements with parameters of its own: a row, or the whole tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from types import FunctionType
from typing import Any, final

from lfm.tensors import compiled

Each = tuple[float, ...]
"""A formula's parameter that has one value a model."""

BLOCK = 512
"""Elements at a time: a few fp64 rows of them fit the innermost cache."""

CODES = {"F64": 0, "F32": 1, "BF16": 2, "F16": 3}
"""Formats that kernels read and write."""

HIGH, LOW = 15, 16
"""Bits of the two digits of an fp32 magnitude."""

WINDOW = 3 << LOW
"""Magnitudes next to each other that are counted one by one."""

NEAR = 2 + WINDOW
"""Numbers of a count near a window: the bits of its least magnitude, how many are beyond it, how many have each."""


@final
@dataclass(frozen=True)
class Formula:
    """What is computed of one element: `first` of each model's alone, where there is one, then `join` of them all.

    first(base, x, …): its parameters are one a model, `random` a uniform number in [0, 1). join(base, x, …): x is the
    tuple of what first gave. Where `base` is not among a function's arguments it is not handed over.
    """

    join: Callable[..., float]
    first: Callable[..., float] | None = None
    leading: int = 0  # arguments of join before those, written out as constants
    apart: bool = False  # each model's alone is joined: as many results as models, which are counted side by side

    @cached_property
    def has_base(self) -> bool:
        return any("base" in _names(fn) for fn in (self.join, self.first) if fn)

    @cached_property
    def random(self) -> bool:
        return self.first is not None and "random" in _names(self.first)

    @cached_property
    def parameters(self) -> dict[str, bool]:
        """Each parameter's name, and whether it has one value a model."""
        known = ("base", "x", "random")
        found = {name: True for name in (_names(self.first) if self.first else ()) if name not in known}
        for p in list(inspect.signature(self.join).parameters.values())[self.leading :]:
            if p.name not in known:
                many = p.annotation not in ("float", float)
                assert many or p.name not in found, p
                found[p.name] = many
        return found

    def results(self, models: int) -> int:
        return models if self.apart else 1

    def columns(self, models: int) -> int:
        return sum(models if many else 1 for many in self.parameters.values())


def _names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


@cache
def map_kernel(formula: Formula, models: int) -> Callable[..., None]:
    """Stores each element's result in the format codes[0].

    flags[0] is set if a result is not finite, flags[1 + i] if input i holds what is not.
    """
    row = f"rows[{models + 1}]"
    body = f"""
        for i in range(m):
            {row}[i] = join({_call(formula, models)})
        if encode({row}, codes[0], made, at, m):
            flags[0] = 1
"""
    return compiled.load(_source(formula, models, "made = carray(out, (count * 8,))", body))


@cache
def sum_kernel(formula: Formula, models: int, which: tuple[tuple[int, ...], ...]) -> Callable[..., None]:
    """Adds join(*which[j], …) to out[group, j], fp64; groups count from that of the first element."""
    call, count = _call(formula, models), len(which)
    lines = [f"        s{j} = 0.0" for j in range(count)]
    lines.append("        for i in range(m):")
    for j, constants in enumerate(which):
        lines.append(f"            s{j} += join({''.join(f'{c}, ' for c in constants)}{call})")
    lines += [f"        totals[(g - first_group) * {count} + {j}] += s{j}" for j in range(count)]
    view = f"totals = carray(out, (((start + count - 1) // width - first_group + 1) * {count} * 8,)).view(np.float64)"
    return compiled.load(_source(formula, models, view, "\n".join(lines)), reassociate=True)


@cache
def count_kernel(formula: Formula, models: int) -> Callable[..., None]:
    """Counts each |result| as fp32 by its high digit, in out, int64 (results, 2^HIGH)."""
    count = formula.results(models)
    body = "".join(
        f"""
{_bits(formula, models, r)}
        for i in range(m):
            tally[{r << HIGH} + (bits[i] >> np.uint32({LOW}))] += 1
"""
        for r in range(count)
    )
    view = f"""tally = carray(out, ({8 * count << HIGH},)).view(np.int64)
    bits = rows[{models + 1}].view(np.uint32)"""
    return compiled.load(_source(formula, models, view, body))


@cache
def near_kernel(formula: Formula, models: int) -> Callable[..., None]:
    """Counts each |result| as fp32 in out, int64 (results, NEAR): those beyond a window, then those within it by their
    bits. The window's least bits stand there first; it is WINDOW of them wide."""
    count = formula.results(models)
    body = "".join(
        f"""
{_bits(formula, models, r)}
        above = 0
        for i in range(m):
            above += bits[i] >= end{r}
        tally[{r * NEAR + 1}] += above
        for i in range(m):
            within[i] = bits[i] - lowest{r} < np.uint32({WINDOW})
        for i in range(m, (m + 7) // 8 * 8):
            within[i] = 0
        for j in range((m + 7) // 8):  # few are within: eight are passed over at a time
            if eight[j]:
                for i in range(8 * j, 8 * j + 8):
                    if within[i]:
                        tally[{r * NEAR + 2} + np.uint32(bits[i] - lowest{r})] += 1
"""
        for r in range(count)
    )
    bounds = "".join(
        f"""
    lowest{r} = np.uint32(tally[{r * NEAR}])
    end{r} = np.uint32(lowest{r} + np.uint32({WINDOW}))"""
        for r in range(count)
    )
    view = f"""tally = carray(out, ({8 * count * NEAR},)).view(np.int64)
    bits = rows[{models + 1}].view(np.uint32)[:{BLOCK}]
    within = rows[{models + 1}].view(np.uint8)[{4 * BLOCK}:{5 * BLOCK}]
    eight = within.view(np.uint64){bounds}"""
    return compiled.load(_source(formula, models, view, body))


def _bits(formula: Formula, models: int, result: int) -> str:
    call = _call(formula, models, result if formula.apart else None)
    return f"""        for i in range(m):
            bits[i] = np.float32(join({call})).view(np.uint32) & np.uint32(0x7FFFFFFF)"""


def _call(formula: Formula, models: int, only: int | None = None) -> str:
    """The arguments of join after its leading ones, for element i. only: of one model alone."""
    joined = range(models) if only is None else [only]

    def one(j: int) -> str:
        value = f"rows[{j + 1}, i]"
        if formula.first is None:
            return value
        special = {"base": "rows[0, i]", "x": value, "random": f"uniform(keys[{j}], start + at + i)"}
        return f"first({', '.join(special.get(name, f'{name}[{j}]') for name in _names(formula.first))})"

    special = {"base": "rows[0, i]", "x": "(" + "".join(f"{one(j)}, " for j in joined) + ")"}
    return ", ".join(special.get(name, name) for name in _names(formula.join)[formula.leading :])


def _source(formula: Formula, models: int, view: str, body: str) -> str:
    loads, column = [], 0
    for name, many in formula.parameters.items():
        cells = "".join(f"p[{column + j}], " for j in range(models))
        loads.append(f"        {name} = ({cells})" if many else f"        {name} = p[{column}]")
        column += models if many else 1
    skipped = 0 if formula.has_base else 1
    inputs = models + 1 - skipped
    text = f"""
def {compiled.ENTRY}({", ".join(name for name, _ in compiled.SIGNATURE)}):
    raw = carray(raw_, ({inputs} * stride,))
    codes = carray(codes_, ({inputs + 1},))
    keys = carray(keys_, ({models},))
    flags = carray(flags_, ({inputs + 1},))
    rows = carray(scratch_, ({models + 2}, {BLOCK}))
    first_group = start // width
    params = carray(params_, ((start + count - 1) // width - first_group + 1, {max(1, column)}))
    {view}
    at = 0
    while at < count:
        g = (start + at) // width
        m = min({BLOCK}, count - at, (g + 1) * width - start - at)
        p = params[g - first_group]
{chr(10).join(loads)}
        for slot in range({inputs}):  # one copy of the code, however many there are
            if decode(raw[slot * stride:(slot + 1) * stride], codes[slot + 1], at, m, rows[slot + {skipped}]):
                flags[slot + 1] = 1
{body.strip(chr(10))}
        at += m
"""
    parts = [(formula.join, "join"), *([(formula.first, "first")] if formula.first else [])]
    helpers = dict.fromkeys(helper for function, _ in parts for helper in _used(function))
    own = [*map(compiled.inlined, helpers), *(compiled.inlined(function, name) for function, name in parts)]
    return "\n\n".join([*own, text])


def _used(function: Any) -> list[Any]:
    """The functions of lfm that a formula calls, deepest first."""
    found: list[Any] = []
    for name in function.__code__.co_names:
        other = function.__globals__.get(name)
        if isinstance(other, FunctionType) and inspect.getmodule(other) is not None:
            found += [inner for inner in (*_used(other), other) if inner not in found]
    return found
