"""Undo: a change that leaves most of a model alone comes off to the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfm import record
from lfm.core.errors import OutputError, VerifyError
from lfm.core.interfaces import LazyTensor, Weights
from lfm.core.model import Model

STEM = "undo"
TENSORS = f"{STEM}.safetensors"
LARGEST_SHARE = 0.5
"""Of the model's bytes: past it, keeping the base itself is what one would want."""


def keep(made: Model, base: Model | None, artefact: Path) -> bool:
    """Write beside a changed checkpoint what its base held in place of what changed; False where that is too much.

    Beside an adapter nothing is needed: its base is as it was.
    """
    from lfm.tensors.write import write_tensors

    if made.restore and (artefact / "base.json").exists():
        return True
    if base is None or not made.restore or made.kind != "checkpoint" or not made.can(Weights):
        return False
    changed = _changed(made.ask(Weights).tensors(), made.restore, LARGEST_SHARE * base.facts.bytes)
    if not changed:
        return False
    write_tensors(artefact, changed, stem=STEM)
    (artefact / "undo.json").write_text(json.dumps({"base": base.digest, "tensors": sorted(changed)}, indent=1) + "\n")
    return True


def undo(directory: Path, out: Path, load: Any) -> str:
    """Write to `out` the model as it was before the run; its digest is the base's. OutputError if that was not kept."""
    from lfm.tensors.files import open_tensors

    run = record.read(directory)
    if out.exists():
        raise OutputError(f"{out} exists", fix="choose another --out, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    made = load(directory)
    if run.output.kind == "adapter":
        base = run.inputs[0].digest
        recorded = json.loads((directory / "base.json").read_text())
        under = recorded["digest"] == base  # or else it went over what had an adapter already
        before = load(recorded["ref"] if under else run.inputs[0].path or run.inputs[0].ref)
    elif (directory / TENSORS).exists():
        before = made.ask(Weights).replace(open_tensors(directory / TENSORS))
        base = json.loads((directory / "undo.json").read_text())["base"]
    else:
        raise OutputError(
            f"{directory} cannot be undone",
            why="its run changed most of the model, or made a new one",
            fix="its input is named in run.json: " + ", ".join(i.ref for i in run.inputs),
        )
    if before.digest != base:
        raise VerifyError(
            "undoing does not give the base back", why=f"digest {before.digest[:12]}, the base had {base[:12]}"
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        before.save(partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return base


def _changed(
    after: Mapping[str, LazyTensor], before: Mapping[str, LazyTensor], limit: float
) -> dict[str, LazyTensor] | None:
    """What differs; None as soon as it has more than `limit` bytes. A tensor is read up to its first difference."""
    from lfm.tensors.lazy import code_of, size
    from lfm.tensors.match import equal
    from lfm.tensors.safetensors_file import DTYPES

    found, taken = {}, 0
    for name, old in before.items():
        if name in after and not equal(old, after[name]):
            found[name] = old
            taken += size(old) * DTYPES[code_of(old)][1]
            if taken > limit:
                return None
    return found
