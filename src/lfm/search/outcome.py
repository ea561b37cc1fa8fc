"""What tries of methods came to: which is best, by how much, and what quality costs."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, pvariance
from typing import Any, NamedTuple

import msgspec

from lfm.core.errors import LfmError
from lfm.core.finding import Finding, Scatter, table

Z = 1.96
TIE = 1e-6
"""What the loss counts where quality decides; less than one record in a million."""


class Result(NamedTuple):
    """What a training came to. valid: the marks of records that choose nothing, of the longest trainings alone."""

    quality: float
    loss: float
    valid: list[float]
    trained: int
    seconds: float
    error: str

    @property
    def score(self) -> float:
        """What is maximised: quality, and of equals the lower loss."""
        return self.quality - TIE * self.loss / (1 + self.loss)

    def better(self, other: Result) -> bool:
        """Of equal scores the one that trains fewer numbers."""
        return (self.score, -self.trained) > (other.score, -other.trained)


def failed(error: Exception) -> Result:
    """A training that came to nothing, and why: what a user's error says; of any other its kind, its first line and
    where it was raised."""
    if isinstance(error, LfmError):
        return Result(0.0, 0.0, [], 0, 0.0, f"{error.what}{f' ({error.why})' if error.why else ''}")
    said = (str(error).strip().splitlines() or ["no message"])[0]
    *_, last = [""] + [f", {Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
    return Result(0.0, 0.0, [], 0, 0.0, f"unexpected {type(error).__name__}{last}: {said}")


class Ended(NamedTuple):
    """A try with its settings in full words and its last result."""

    id: str
    settings: dict[str, Any]
    share: float
    result: Result

    @property
    def whole(self) -> bool:
        return self.share == 1 and not self.result.error

    @property
    def settings_told(self) -> str:
        return ", ".join(f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.settings.items())

    @property
    def name(self) -> str:
        return f"{self.id} ({self.settings_told})" if self.settings else self.id


def furthest(done: Sequence[Ended]) -> list[Ended]:
    """Of each method the try that came furthest, and there did best."""
    found: dict[str, Ended] = {}
    for one in sorted((e for e in done if not e.result.error), key=lambda e: (-e.share, -e.result.score)):
        found.setdefault(one.id, one)
    return list(found.values())


def ranked(done: Sequence[Ended]) -> list[Ended]:
    """Of each method the best whole try, by dev; the best method first."""
    found: dict[str, Ended] = {}
    for one in sorted((e for e in done if e.whole), key=lambda e: (-e.result.score, e.result.trained)):
        found.setdefault(one.id, one)
    return list(found.values())


def told(done: Sequence[Ended], order: Sequence[Ended]) -> Finding:
    """All tries as a table, the answer as its title, and what quality costs."""
    rows = []
    for e in sorted(done, key=lambda e: (bool(e.result.error), -e.share, -e.result.score)):
        at = _of(e) if e.result.valid else None
        rows.append(
            {
                "method": e.id,
                "settings": e.settings_told,
                "trained": e.result.trained,
                "length": e.share,
                "dev": None if e.result.error else e.result.quality,
                "valid": at.value if at else None,
                "low": at.low if at else None,
                "high": at.high if at else None,
                "seconds": e.result.seconds,
                **({"why not": e.result.error} if any(e.result.error for e in done) else {}),
            }
        )
    whole = [e for e in done if e.whole]
    ends = [_of(e) for e in whole]

    def plot(name: str, x: list[float], label: str) -> Scatter:
        return Scatter(
            name=name,
            labels=tuple(e.id for e in whole),
            x=tuple(x),
            y=tuple(at.value for at in ends),
            low=tuple(at.low for at in ends),
            high=tuple(at.high for at in ends),
            x_label=label,
            y_label="told right",
        )

    return msgspec.structs.replace(
        table(answer(order), rows),
        scatters=(
            plot("quality by how many numbers train", [float(e.result.trained) for e in whole], "trained numbers"),
            plot("quality by what training takes", [e.result.seconds for e in whole], "seconds"),
        ),
    )


def answer(order: Sequence[Ended]) -> str:
    """Which tuner for these records, and because of what."""
    best, marks = order[0], order[0].result.valid
    at = _of(best)
    said = (
        f"For your data: {best.name}, because it tells {_percent(at.value)} right ({_percent(at.low)} to "
        f"{_percent(at.high)}) of {len(marks)} {'record' if len(marks) == 1 else 'records'} that chose nothing, with "
        f"{best.result.trained:,} trained numbers"
    )
    if len(order) == 1:
        return f"{said}; no other method came to a whole training"
    against = [
        (e, interval([a - b for a, b in zip(marks, e.result.valid, strict=True)], (-1.0, 1.0))) for e in order[1:]
    ]
    second, by = against[0]
    least = f"{100 * by.low:+.1f} to {100 * by.high:+.1f} points"
    if by.high < 0:
        return (
            f"{said}; but on these {second.id}, the second by dev, does better ({least}): "
            f"more records would choose better"
        )
    verdict = "that is more" if by.low > 0 else "no difference can be told"
    said += f"; against {second.id}, the next best, {verdict} ({least})"
    equal = [e for e, gap in against if gap.low <= 0 and e.result.trained < best.result.trained]
    if equal:
        small = min(equal, key=lambda e: e.result.trained)
        said += f"; of those not told from it {small.id} trains the fewest numbers, {small.result.trained:,}"
    return said


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def interval(values: Sequence[float], more: Sequence[float]) -> Interval:
    """Wald's 95 % interval of a mean once values at the ends of their range are added; it holds the mean.

    more: 0, 0, 1, 1 for shares (Agresti and Coull 1998, doi 10.1080/00031305.1998.10480550), −1, 1 for differences of
    pairs of them (Bonett and Price 2012, doi 10.3102/1076998611411915). Where all values agree it still has a width.
    """
    held, value = [*values, *more], mean(values)
    middle, half = mean(held), Z * (pvariance(held) / len(held)) ** 0.5
    return Interval(value, min(value, max(min(more), middle - half)), max(value, min(max(more), middle + half)))


def noted(best: Ended) -> dict[str, float]:
    """The winner's quality and its interval."""
    at = _of(best)
    return {"quality": at.value, "quality_low": at.low, "quality_high": at.high}


def _of(one: Ended) -> Interval:
    return interval(one.result.valid, (0.0, 0.0, 1.0, 1.0))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
