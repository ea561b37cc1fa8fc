"""Runs: models in, a verified new model out; the directory that tells it, and what can be asked of it later."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lfm.core import registry
from lfm.core.config import configure
from lfm.core.model import Model
from lfm.record import RunRecord as RunRecord
from lfm.record import Verified
from lfm.record import read as read
from lfm.runs import verification
from lfm.runs.ancestry import Node as Node
from lfm.runs.ancestry import lineage as lineage
from lfm.runs.comparison import Comparison as Comparison
from lfm.runs.comparison import compare as compare
from lfm.runs.execute import Order as Order
from lfm.runs.execute import Prepared as Prepared
from lfm.runs.execute import execute as execute
from lfm.runs.execute import key_of as key_of
from lfm.runs.execute import prepare as prepare
from lfm.runs.execute import versions as versions
from lfm.runs.planning import plan as plan
from lfm.runs.refs import model as model
from lfm.runs.refs import records as records
from lfm.runs.run import LocalRun as LocalRun
from lfm.runs.run import Show as Show
from lfm.runs.undoing import undo as _undo


def configured(id: str, settings: Mapping[str, Any]) -> Any:
    """A method's Config from plain settings. ConfigError where they do not fit."""
    return configure(registry.get(id).method.config, settings, where=id)


def verify(directory: Path) -> Verified:
    """Hold a run directory against its own record. VerifyError if its bytes or its answers have changed.

    An endpoint is asked anew, the probe's few questions: kept answers would agree with themselves.
    """
    from lfm.runs import places

    with TemporaryDirectory() as fresh:
        return places.verified(directory) or verification.verify(directory, partial(model, cache=Path(fresh)))


def undo(directory: Path, out: Path) -> str:
    """Write the model as it was before the run to `out`; returns its digest, which is the base's."""
    from lfm.runs import places

    places.not_undone(directory)
    return _undo(directory, out, model)


__all__ = ["Model"]
