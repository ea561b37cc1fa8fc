"""Learn From Model: turn models that already exist into the model you need.

lfm.load("path/or/zoo:lm").ask(lfm.Text).generate(["Once upon a time"])
lfm.run("edit.rome", {"model": "zoo:lm"}, {"edits": "edits.jsonl"}, out="edited")
lfm.methods(have=[lfm.Text], data=lfm.Data.NONE)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm.core import Codec as Codec
from lfm.core import Config as Config
from lfm.core import Data as Data
from lfm.core import Embeddings as Embeddings
from lfm.core import Features as Features
from lfm.core import Finding as Finding
from lfm.core import Gradients as Gradients
from lfm.core import Logits as Logits
from lfm.core import Logprobs as Logprobs
from lfm.core import Method as Method
from lfm.core import Model as Model
from lfm.core import Text as Text
from lfm.core import Weights as Weights
from lfm.core.registry import methods as methods

if TYPE_CHECKING:
    from lfm.data.records import Record
    from lfm.record import RunRecord
    from lfm.runs.plan import Plan

__all__ = ["load", "methods", "plan", "run"]


def load(ref: str | Path, **how: Any) -> Model:
    """A model by reference: a directory, a .safetensors file (module=…), zoo:NAME, api:URL#MODEL, or serve:REF."""
    from lfm import runs

    return runs.model(ref, **how)


def _order(
    id: str,
    models: Mapping[str, Any],
    data: Mapping[str, str | Path | Sequence[Record]] | None,
    out: str | Path,
    settings: Mapping[str, Any],
    rest: Mapping[str, Any],
) -> Any:
    from lfm import runs

    listed = {r: [m] if isinstance(m, str | Path | Model) else list(m) for r, m in models.items()}
    return runs.Order(id=id, models=listed, data=dict(data or {}), settings=settings, out=Path(out), **rest)


def run(
    id: str,
    models: Mapping[str, Any],
    data: Mapping[str, str | Path | Sequence[Record]] | None = None,
    *,
    out: str | Path,
    set: Mapping[str, Any] | None = None,
    **rest: Any,
) -> RunRecord:
    """Run a method and publish its directory `out`. rest: seed, evals, form, budget, title (see lfm.runs.Order)."""
    from lfm import runs

    return runs.execute(_order(id, models, data, out, set or {}, rest))


def plan(
    id: str,
    models: Mapping[str, Any],
    data: Mapping[str, str | Path | Sequence[Record]] | None = None,
    *,
    out: str | Path = "out",
    set: Mapping[str, Any] | None = None,
    **rest: Any,
) -> Plan:
    """What that run would take: access, time, memory, disk, queries and tokens. Reads no weight."""
    from lfm import runs

    return runs.plan(runs.prepare(_order(id, models, data, out, set or {}, rest)))
