"""evaluate: one call for any model and any kind of record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import msgspec

from lfm.core.errors import ConfigError
from lfm.core.interfaces import name_of
from lfm.core.model import Model
from lfm.data import files
from lfm.data.records import Audio, Edit, Fact, Image, Label, Pair, Record
from lfm.data.task import Task, one_kind
from lfm.evals import classes, edits, likelihood, recall
from lfm.evals.estimate import Metric, difference, estimates
from lfm.evals.setting import Found, Progress, Sample, Setting, access_for


@final
class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What a model scores on records. access: the interface the metrics rest on. notes: what to know of the numbers.

    headline: the metric to show if only one is shown. model, data: digests of what was measured.
    """

    kind: str
    access: str
    headline: str
    metrics: dict[str, Metric]
    samples: tuple[Sample, ...] = ()
    notes: tuple[str, ...] = ()
    model: str = ""
    data: str = ""
    records: int = 0
    seed: int = 0
    bootstrap: int = 0


@final
class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two models on the same records; change: after − before, with intervals over records resampled together."""

    before: Evaluation
    after: Evaluation
    change: dict[str, Metric]


def evaluate(
    model: Model,
    records: Sequence[Record],
    *,
    task: Task | None = None,
    metrics: Sequence[str] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    bootstrap: int = 1000,
    samples: int = 5,
    progress: Progress | None = None,
) -> Evaluation:
    """What the model scores on these records, with 95 % percentile-bootstrap intervals over records.

    The metrics rest on logits where the model gives them, else on log-probabilities, else on text; answers are also
    generated where it gives text. task: in place of the one that the records set. metrics: only these; the others then
    cost nothing. progress: called with (done, total), the total growing as questions are found.
    AccessError if the model gives too little for these records; ConfigError names the metrics there are.
    """
    found, setting = _found(model, records, task, metrics, batch_size, samples, progress)
    return _evaluation(setting, found, seed, bootstrap)


def compare(
    before: Model,
    after: Model,
    records: Sequence[Record],
    *,
    metrics: Sequence[str] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    bootstrap: int = 1000,
    samples: int = 5,
    progress: Progress | None = None,
) -> Comparison:
    """Both evaluations, and each shared metric's change with the interval of the paired bootstrap."""
    old, old_setting = _found(before, records, None, metrics, batch_size, samples, progress)
    new, new_setting = _found(after, records, None, metrics, batch_size, samples, progress)
    was = {m.name: m for m in old.measures}
    changes = [difference(was[m.name], m) for m in new.measures if m.name in was]
    return Comparison(
        before=_evaluation(old_setting, old, seed, bootstrap),
        after=_evaluation(new_setting, new, seed, bootstrap),
        change=estimates(changes, seed=seed, bootstrap=bootstrap),
    )


def _found(
    model: Model,
    records: Sequence[Record],
    task: Task | None,
    metrics: Sequence[str] | None,
    batch_size: int,
    samples: int,
    progress: Progress | None,
) -> tuple[Found, Setting]:
    kind = one_kind(records)
    counted = [0, 0]

    def done(more: int) -> None:
        counted[0] += more
        counted[1] = max(counted)
        if progress:
            progress(counted[0], max(counted[1], len(records)))

    offered: set[str] = set()

    def wants(name: str) -> bool:
        offered.add(name)
        return metrics is None or name in metrics

    setting = Setting(model, records, access_for(model, records), task, batch_size, samples, wants, done)
    if kind in (Label, Pair, Image, Audio):
        found = classes.measure(setting)
    elif kind is Fact:
        found = recall.measure(setting)
    elif kind is Edit:
        found = edits.measure(setting)
    else:
        found = likelihood.measure(setting)
    unknown = set(metrics or ()) - offered
    if unknown:
        raise ConfigError(
            f"no metric {', '.join(sorted(unknown))} for these {kind.__struct_config__.tag} records",
            why=f"the model is measured by {name_of(setting.access)}",
            fix=f"metrics: {', '.join(sorted(offered))}",
        )
    return found, setting


def _evaluation(setting: Setting, found: Found, seed: int, bootstrap: int) -> Evaluation:
    measured = estimates(found.measures, seed=seed, bootstrap=bootstrap)
    return Evaluation(
        kind=str(type(setting.records[0]).__struct_config__.tag),
        access=name_of(setting.access),
        headline=next(iter(measured), ""),
        metrics=measured,
        samples=tuple(found.samples[: setting.samples]),
        notes=tuple(found.notes),
        model=setting.model.digest,
        data=files.digest(setting.records),
        records=len(setting.records),
        seed=seed,
        bootstrap=bootstrap,
    )
