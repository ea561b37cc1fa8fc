"""What a run's edits did, for its record: the model before and the one that was saved, asked the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from lfm.core.errors import LfmError
from lfm.core.finding import Finding, Map
from lfm.core.model import Model
from lfm.data.records import Edit, Fact
from lfm.runs import refs

if TYPE_CHECKING:
    from lfm.record import Edited
    from lfm.runs.execute import Prepared
    from lfm.runs.run import LocalRun

ROLE, EARLIER = "edits", "memory"
"""The role of data that is edited, and of a model that holds what was edited before."""


def looked(run: LocalRun, prepared: Prepared, saved: Model | Finding) -> Edited | None:
    """Free text and probabilities before and after; None where no facts were edited, or where asking is paid for. What
    cannot be asked is noted: the edits have been made, and measured by their method."""
    try:
        return _looked(run, prepared, saved)
    except LfmError as error:
        run.note(not_asked_again=error.what)
        return None


def _looked(run: LocalRun, prepared: Prepared, saved: Model | Finding) -> Edited | None:
    edits: Sequence[Edit | Fact] = prepared.inputs.records(ROLE)
    given = prepared.order.models
    if not edits or not isinstance(edits[0], Edit | Fact) or isinstance(saved, Finding):
        return None
    if any(model.kind == "api" for models in prepared.whole.models.values() for model in models):
        return None
    from lfm.evals import edited

    role = EARLIER if given.get(EARLIER) else "model"
    if not given.get(role) or not edited.can_be_asked(saved):
        return None
    then = refs.model(given[role][0])  # anew: nothing else holds what is opened of it
    if not edited.can_be_asked(then):
        return None
    undone = getattr(prepared.config, "forget", None) is True
    facts = [r for records in prepared.evals.values() for r in records if isinstance(r, Fact)]
    put = edited.asked(edits, facts, masked=then.facts.task == "masked-lm", undone=undone)
    run.show("asking before and after", 0, None)
    before = run.step("asked before", partial(edited.heard, then, put))
    maps: list[dict[str, Any]] = []
    if edited.traceable(then, edits):
        run.show("tracing", 0, None)
        maps = run.step("traced", partial(_traced, then, edits, run))
    then = None  # what was opened of it goes before the other is opened
    after = run.step("asked after", partial(edited.heard, saved, put))
    found = edited.compared(edits, put, before, after)
    return msgspec.structs.replace(found, traces=tuple(msgspec.convert(each, Map) for each in maps))


def _traced(model: Model, edits: Sequence[Edit | Fact], run: LocalRun) -> list[dict[str, Any]]:
    from lfm.evals import edited

    return [msgspec.to_builtins(each) for each in edited.traces(model, edits, run.generator("where facts are"))]
