"""What a tensor's numbers are like, found in one pass over its stored bytes while they are in cache."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.heavy import np
from lfm.fusing import kernel
from lfm.tensors import compiled

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = kernel.BLOCK
WHOLE = {"BOOL": "bool", "U8": "u1", "I8": "i1", "U16": "u2", "I16": "i2", "U32": "u4", "I32": "i4", "U64": "u8"}
WHOLE["I64"] = "i8"
"""Formats of whole numbers, as numpy calls them."""

SUM, SQUARES, ZEROS, ODD, CHANGE, LOW, HIGH = range(7)


class Statistics(NamedTuple):
    """Of the finite elements: ‖x‖₂, extremes, mean, share of zeros; the number of others; ‖x − base‖₂ if there is one.

    None where no element is finite, or the format has no arithmetic here (fp8).
    """

    norm: float | None
    min: float | None
    max: float | None
    mean: float | None
    zeros: float | None
    nonfinite: int
    change: float | None


def readable(code: str) -> bool:
    """Whether a format's numbers can be looked at."""
    return code in kernel.CODES or code in WHOLE


class Tally:
    """Adds up parts of one tensor, in order; parts of its base beside them where there is one."""

    def __init__(self, code: str, base: str | None = None) -> None:
        self._codes = code, base
        self._found = np.zeros(7)
        self._found[LOW], self._found[HIGH] = np.inf, -np.inf
        self._count = 0

    def add(self, part: memoryview, base: memoryview | None = None) -> None:
        """One part's bytes, and the base's of the same elements."""
        one, code = _numbers(part, self._codes[0])
        count = len(one) // _ITEM[code]
        other, beside = _numbers(base, self._codes[1]) if base is not None and self._codes[1] else (one, -1)
        codes, flags = np.array([code, beside], dtype=np.int64), np.zeros(1, dtype=np.int64)
        scratch = np.empty((4, BLOCK))
        pointers = (x.ctypes.data for x in (self._found, codes))
        _kernel()(
            one.ctypes.data, len(one), *pointers, None, other.ctypes.data, scratch.ctypes.data, flags.ctypes.data,
            1, 0, count,
        )  # fmt: skip
        self._count += count

    def statistics(self) -> Statistics:
        """Of all that was added."""
        found = [float(value) for value in self._found]
        finite = self._count - int(found[ODD])
        change = found[CHANGE] ** 0.5 if self._codes[1] else None
        if not finite:
            return Statistics(None, None, None, None, None, int(found[ODD]), None)
        return Statistics(
            norm=found[SQUARES] ** 0.5,
            min=found[LOW],
            max=found[HIGH],
            mean=found[SUM] / finite,
            zeros=found[ZEROS] / self._count,
            nonfinite=int(found[ODD]),
            change=change,
        )


_ITEM = {0: 8, 1: 4, 2: 2, 3: 2}


def _numbers(part: memoryview, code: str | None) -> tuple[Any, int]:
    """Bytes that the kernel reads, and their format there; whole numbers as fp64."""
    assert code is not None
    raw = np.frombuffer(part, dtype=np.uint8)
    if code in kernel.CODES:
        return raw, kernel.CODES[code]
    return raw.view(WHOLE[code]).astype(np.float64).view(np.uint8), 0


@cache
def _kernel() -> Callable[..., None]:
    body = f"""
def {compiled.ENTRY}({", ".join(name for name, _ in compiled.SIGNATURE)}):
    raw = carray(raw_, (stride,))
    beside = carray(keys_, (count,)).view(np.uint8)  # at most so long
    codes = carray(codes_, (2,))
    rows = carray(scratch_, (4, {BLOCK}))
    found = carray(out, (56,)).view(np.float64)
    low, high = rows[2], rows[3]
    for i in range({BLOCK}):
        low[i] = found[{LOW}]
        high[i] = found[{HIGH}]
    at = 0
    while at < count:
        m = min({BLOCK}, count - at)
        x = rows[0]
        bad = decode(raw, codes[0], at, m, x)
        if codes[1] >= 0:
            bad |= decode(beside, codes[1], at, m, rows[1])
            moved = 0.0
            for i in range(m):
                apart = x[i] - rows[1, i]
                if apart - apart == 0.0 or not bad:
                    moved += apart * apart
            found[{CHANGE}] += moved
        if bad:
            for i in range(m):
                if x[i] - x[i] != 0.0:
                    found[{ODD}] += 1.0
                else:
                    found[{SUM}] += x[i]
                    found[{SQUARES}] += x[i] * x[i]
                    found[{ZEROS}] += x[i] == 0.0
                    low[i] = min(low[i], x[i])
                    high[i] = max(high[i], x[i])
        else:
            total = 0.0
            squares = 0.0
            zeros = 0
            for i in range(m):
                total += x[i]
                squares += x[i] * x[i]
                zeros += x[i] == 0.0
            for i in range(m):  # element by element: a reduction to one number would not be vectorised
                low[i] = x[i] if x[i] < low[i] else low[i]
                high[i] = x[i] if x[i] > high[i] else high[i]
            found[{SUM}] += total
            found[{SQUARES}] += squares
            found[{ZEROS}] += zeros
        at += m
    for i in range({BLOCK}):
        found[{LOW}] = min(found[{LOW}], low[i])
        found[{HIGH}] = max(found[{HIGH}], high[i])
"""
    return compiled.load(body, reassociate=True)
