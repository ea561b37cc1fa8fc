"""What differs between two models: their configs' facts, their weights tensor by tensor, and what they answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import msgspec

from lfm.core.errors import LfmError
from lfm.core.interfaces import Weights
from lfm.core.model import Model
from lfm.data.records import Record
from lfm.record import Measure, Sample
from lfm.runs import verification

SAMPLES = 50
"""Answers looked at for those that differ."""


@final
class TensorChange(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor's change. relative: ‖b − a‖ / ‖a‖ (Frobenius); max_abs: largest absolute difference."""

    name: str
    max_abs: float
    relative: float


@final
class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """a against b. facts: those that differ, as (a, b). only_a, only_b: tensors that one lacks.

    changes: each metric's b − a, its interval over records resampled together. samples: answers, the differing first.
    """

    same: bool
    facts: dict[str, tuple[Any, Any]]
    tensors: int
    changed: tuple[TensorChange, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    answers: str
    metrics: dict[str, tuple[Measure, Measure]] = {}
    changes: dict[str, Measure] = {}
    samples: tuple[Sample, ...] = ()


def compare(a: Model, b: Model, data: Sequence[Record] = ()) -> Comparison:
    """Compare by all that both give; with data, also by what they score and say on it."""
    facts = {k: (x, y) for (k, x), y in zip(a.facts._asdict().items(), b.facts, strict=True) if x != y}
    changed, only_a, only_b, count = _weights(a, b) if a.can(Weights) and b.can(Weights) else ((), (), (), 0)
    try:
        answers = f"max |Δ{(found := verification.compare(a, b)).quantity}| = {found.max_abs:.3g} on {found.on}"
    except LfmError as error:
        answers = error.what
    metrics: dict[str, tuple[Measure, Measure]] = {}
    changes: dict[str, Measure] = {}
    samples: tuple[Sample, ...] = ()
    if data:
        from lfm import evals

        both = evals.compare(a, b, data, samples=SAMPLES)
        x, y = both.before, both.after
        metrics = {name: (_measure(x.metrics[name]), _measure(y.metrics[name])) for name in both.change}
        changes = {name: _measure(change) for name, change in both.change.items()}
        said = {s.prompt: s.answer for s in x.samples}
        shown = [Sample(prompt=s.prompt, before=said.get(s.prompt, ""), after=s.answer) for s in y.samples]
        samples = tuple(sorted(shown, key=lambda sample: sample.before == sample.after))
    return Comparison(
        same=a.digest == b.digest,
        facts=facts,
        tensors=count,
        changed=changed,
        only_a=only_a,
        only_b=only_b,
        answers=answers,
        metrics=metrics,
        changes=changes,
        samples=samples,
    )


def _measure(value: Any) -> Measure:
    return Measure(value=value.value, low=value.low, high=value.high, n=value.n)


def _weights(a: Model, b: Model) -> tuple[tuple[TensorChange, ...], tuple[str, ...], tuple[str, ...], int]:
    x, y = a.ask(Weights).tensors(), b.ask(Weights).tensors()
    changed = []
    for name in (n for n in x if n in y):
        old, new = x[name].read().double(), y[name].read().double()
        apart = verification.distance(old, new)
        if apart:
            relative = float((new - old).norm() / old.norm()) if old.shape == new.shape and old.norm() else apart
            changed.append(TensorChange(name=name, max_abs=apart, relative=relative))
    changed.sort(key=lambda c: -c.relative)
    return tuple(changed), tuple(n for n in x if n not in y), tuple(n for n in y if n not in x), len(x)
