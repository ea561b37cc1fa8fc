"""Classes: accuracy, macro-averaged F1, cross-entropy and calibration, by a head or by the classes' names in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from lfm.core.heavy import F, np
from lfm.core.interfaces import Classes, Logits, Text
from lfm.data.answers import begins_with
from lfm.data.facts import Question, log_probabilities
from lfm.data.records import Audio, Image, Label, Pair, Record
from lfm.data.task import LANGUAGE
from lfm.data.wording import wording
from lfm.evals.estimate import Measure, calibration_error, macro_f1, mean
from lfm.evals.scoring import losses
from lfm.evals.setting import Found, Sample, Setting
from lfm.prompting.classifier import LEAST

if TYPE_CHECKING:
    from numpy.typing import NDArray

METRICS = ("accuracy", "macro_f1", "cross_entropy", "ece")


def measure(setting: Setting) -> Found:
    """By the head, else by the likelihood of each class's name, else by what the model says."""
    if setting.access is Text:
        return _by_text(setting)
    if setting.access is Logits and setting.model.facts.task not in LANGUAGE:
        return _by_head(setting)
    return _by_classes(setting) if setting.access is Classes else _by_words(setting)


def _by_classes(setting: Setting) -> Found:
    """By what a prompted model tells of its own classes; a record of another class is never right."""
    asked, records = setting.model.ask(Classes), [cast("Label | Pair", r) for r in setting.records]
    parts = []
    for start in range(0, len(records), setting.batch_size):
        parts.append(asked.tell(records[start : start + setting.batch_size]))
        setting.done(len(parts[-1]))
    told, names = np.concatenate(parts), list(asked.labels)
    truth, best = [r.label for r in records], told.argmax(-1)
    rows = np.arange(len(best))
    right = np.array([names.index(t) if t in names else -1 for t in truth])
    loss = np.where(right >= 0, -told[rows, right], -np.log(LEAST))
    sure = np.exp(told[rows, best])
    return _found(setting, truth, [names[i] for i in best], sorted({*names, *truth}), sure, loss)


def _by_head(setting: Setting) -> Found:
    task = setting.task_of(setting.records)
    truth = task.truth(setting.records)
    predicted = [""] * len(truth)
    sure, loss = np.zeros(len(truth)), np.zeros(len(truth))
    for places, logits, batch in setting.logits(task, setting.records):
        scored, labels = task.scored(logits, batch)
        probabilities = scored.softmax(-1)
        for i, answer in zip(places, task.predict(logits, batch), strict=True):
            predicted[i] = answer
        sure[places] = probabilities.max(-1).values.double().cpu().numpy()
        loss[places] = F.cross_entropy(scored, labels, reduction="none").double().cpu().numpy()
    return _found(setting, truth, predicted, sorted({*truth, *predicted}), sure, loss)


def _by_words(setting: Setting) -> Found:
    """P(name | text) over the names alone: the names' total log-probabilities, normalised."""
    records = [cast("Label | Pair", r) for r in setting.records]
    names = sorted({r.label for r in records})
    told = _by_candidates(setting, names) if setting.access is Logits else _by_scores(setting, records, names)
    places = np.array([names.index(r.label) for r in records])
    shares = _log_softmax(told)
    best = told.argmax(-1)
    found = _found(
        setting,
        [r.label for r in records],
        [names[i] for i in best],
        names,
        np.exp(shares[np.arange(len(best)), best]),
        -shares[np.arange(len(best)), places],
    )
    found.notes.append(f"no head: the classes compete as words after the text ({', '.join(names[:8])})")
    if any(long != short and long.startswith(short) for long in names for short in names):
        found.notes.append("a class's name begins another's: the shorter can only be the likelier of the two")
    return found


def _by_candidates(setting: Setting, names: list[str]) -> NDArray[Any]:
    """(n, classes) log-probabilities of each name over the model's logits; long texts lose their beginning."""
    task = setting.task_of(setting.records)
    columns = [losses(setting, task, [_named(r, name) for r in setting.records]).loss for name in names]
    return -np.stack(columns, axis=1)


def _by_scores(setting: Setting, records: Sequence[Label | Pair], names: list[str]) -> NDArray[Any]:
    asked = [Question(wording(r).prompt, "", tuple(names)) for r in records]
    return np.array(log_probabilities(setting.logprobs(), asked, done=setting.done))


def _by_text(setting: Setting) -> Found:
    records = [cast("Label | Pair", r) for r in setting.records]
    names = sorted({r.label for r in records})
    longest = max(len(name.encode()) for name in names)
    said = setting.said([wording(r).prompt for r in records], max_tokens=max(4, longest))
    heard = [next((n for n in sorted(names, key=len, reverse=True) if begins_with(s, n)), "") for s in said]
    found = _found(setting, [r.label for r in records], heard, names, None, None)
    missed = sum(not h for h in heard)
    found.notes.append(f"read from generated text; {missed} of {len(said)} answers began with no class's name")
    return found


def _found(
    setting: Setting, truth: list[str], predicted: list[str], names: list[str], sure: Any | None, loss: Any | None
) -> Found:
    right = np.array([t == p for t, p in zip(truth, predicted, strict=True)], dtype=np.float64)
    place = {name: i for i, name in enumerate(names)}
    made: list[Measure] = [
        mean("accuracy", right),
        macro_f1([place[t] for t in truth], [place.get(p, -1) for p in predicted], len(names)),
    ]
    if sure is not None and loss is not None:
        made += [mean("cross_entropy", loss, "nats a record"), calibration_error(sure, right)]
    samples = [
        Sample(prompt=_shown(record), answer=p, expected=t)
        for record, t, p in zip(setting.records[: setting.samples], truth, predicted, strict=False)
        if not isinstance(record, Image | Audio)  # words cannot show it
    ]
    return Found([m for m in made if setting.wants(m.name)], samples)


def _named(record: Record, name: str) -> Record:
    import msgspec

    return msgspec.structs.replace(record, label=name)


def _shown(record: Record) -> str:
    if isinstance(record, Image):
        return record.image if isinstance(record.image, str) else "image"
    if isinstance(record, Audio):
        return record.audio if isinstance(record.audio, str) else "audio"
    return wording(record).prompt


def _log_softmax(values: NDArray[Any]) -> NDArray[Any]:
    top = values.max(-1, keepdims=True)
    return values - top - np.log(np.exp(values - top).sum(-1, keepdims=True))
