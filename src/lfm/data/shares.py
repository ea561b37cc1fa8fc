"""Records that several models read: which of them each, and as its batches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import msgspec

from lfm.core.errors import ConfigError, DataError, MismatchError
from lfm.core.interfaces import Batch, Codec
from lfm.core.model import Model
from lfm.data import task as tasks
from lfm.data.files import told_by, where
from lfm.data.records import Record


def shares(records: Sequence[Record], groups: Sequence[str], count: int) -> list[Sequence[Record]]:
    """One sequence a model: the records of its group, or without groups all of them, for every model.

    ConfigError unless there is one group a model; DataError for a group that no record is of.
    """
    if not groups:
        return [records] * count
    if len(groups) != count:
        raise ConfigError(f"groups has {len(groups)} names for {count} models", fix="give one a model, in their order")
    found = [[record for record in records if record.group == name] for name in groups]
    for name, share in zip(groups, found):
        if not share:
            known = sorted({record.group for record in records})
            raise DataError(f"no record is of group {name!r}", why=f"the groups are {', '.join(map(repr, known[:8]))}")
    return list(found)


def by_group(records: Sequence[Record]) -> dict[str, Sequence[Record]]:
    """The records of each group, groups in the order in which they first appear."""
    found: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        found.setdefault(record.group, []).append(place)
    return {name: told_by(records, [records[i] for i in places], places) for name, places in found.items()}


class Learnt(Protocol):
    """What was learned task after task over a base."""

    @property
    def base(self) -> Model: ...

    @property
    def names(self) -> Sequence[str]: ...


def tasks_of(records: Sequence[Record], what: str) -> dict[str, Sequence[Record]]:
    """The records of each task, its group. DataError where one names none; what: a task's own, for the error."""
    groups = by_group(records)
    if nameless := groups.get(""):
        first = where(records, next(place for place, record in enumerate(records) if not record.group))
        raise DataError(
            f"{first}: 'group' names no task"
            + (f", as in {len(nameless) - 1} more of train" if len(nameless) > 1 else ""),
            why=f"each task has {what} of its own, found again by its name",
            fix='give every record its task as "group"',
        )
    return groups


def unlearned(base: Model, earlier: Model, held: Learnt, tasks: Collection[str]) -> None:
    """Whether these tasks can be learned after what `earlier` holds: MismatchError for another base, DataError for a
    task that it has learned already."""
    if held.base.digest != base.digest:
        raise MismatchError(
            f"{earlier.ref} is over another base",
            why=f"that is {held.base.ref} ({held.base.digest[:12]}), base is {base.ref} ({base.digest[:12]})",
            fix=f"base={held.base.ref}",
        )
    if again := sorted(set(tasks) & set(held.names)):
        raise DataError(
            f"{earlier.ref} has learned {', '.join(map(repr, again))} already",
            fix="give the records of a new task a group of their own",
        )


def classless(records: Sequence[Record], model: Model) -> Sequence[Record]:
    """The records as a task takes them though their classes are not asked for: an empty one becomes the first class."""
    if all(getattr(record, "label", "none asked") for record in records):
        return records
    first = next(iter(model.facts.labels), "0")
    return tuple(msgspec.structs.replace(r, label=first) if getattr(r, "label", None) == "" else r for r in records)


def batches(model: Model, records: Sequence[Record], size: int) -> list[Batch]:
    """The records as the model's own batches of `size`, in their order; classes are not needed."""
    codec = model.ask(Codec)
    fitted = tasks.fit(classless(records, model), codec, model.facts)
    task = tasks.task_for(fitted, codec, model.facts)
    return [task.collate(fitted[i : i + size]) for i in range(0, len(fitted), size)]
