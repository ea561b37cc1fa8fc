"""Which of the records each of several models reads."""

from __future__ import annotations

from collections.abc import Sequence

from lfm.core.errors import ConfigError, DataError
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
