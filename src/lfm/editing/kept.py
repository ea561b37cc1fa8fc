"""What an edit measures of a model before it changes anything, kept on disk for the next: by all that decides it.

Under home()/editing, a directory for each, which appears by rename: a kill leaves it whole or not at all. What cannot
be read is made anew, what cannot be written is not kept. Nothing here changes a result, only how soon it comes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm.core.errors import LfmError
from lfm.core.heavy import torch
from lfm.core.home import home
from lfm.core.method import Run
from lfm.data.files import digest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.data.records import Edit
    from lfm.editing.setting import Setting

TOLD, TENSORS = "told.json", "tensors"
SHARE = 0.1
BENEATH = ("core", "tensors", "models", "data", "train", "editing")
PACKAGES = ("learn-from-model", "torch", "transformers", "tokenizers")
"""Parts of lfm, and other packages, that decide what is measured."""

ABANDONED = 86400.0
"""Seconds after which what a kill left half-made is swept away."""


def known(kind: str, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """What make gives, plain JSON: from disk if it was made before under this key. With no "model" in it nothing is
    kept."""
    if not key.get("model"):
        return make()
    found = recalled(kind, key)
    if found is None:
        found = {"value": make()}, {}
        keep(kind, key, *found)
    return found[0]["value"]


def recalled(kind: str, key: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The numbers and tensors kept under a key; None where there are none, or none that can be read."""
    place = _place(kind, key)
    try:
        told = json.loads((place / TOLD).read_text(encoding="utf-8"))
        stored = place / f"{TENSORS}.safetensors"
        if told["sha256"] != _sum(told["told"], stored):
            return None
        if not stored.exists():
            return told["told"], {}
        from lfm.tensors.files import open_tensors

        return told["told"], {name: tensor.read() for name, tensor in open_tensors(stored).items()}
    except (OSError, ValueError, KeyError, TypeError, LfmError):
        return None


def keep(kind: str, key: Mapping[str, Any], told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Keep numbers and tensors under a key, where they take no more than a SHARE of what is free."""
    place = _place(kind, key)
    beside: Path | None = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if size > SHARE * shutil.disk_usage(place.parent).free:
            return
        _sweep(place.parent)
        beside = Path(tempfile.mkdtemp(prefix=".making-", dir=place.parent))
        if tensors:
            from lfm.tensors.write import write_tensors

            write_tensors(beside, tensors, stem=TENSORS, max_shard_bytes=1 << 62)
        with (beside / TOLD).open("w", encoding="utf-8") as file:
            json.dump({"told": told, "sha256": _sum(told, beside / f"{TENSORS}.safetensors")}, file)
            file.flush()
            os.fsync(file.fileno())
        if place.exists() and recalled(kind, key) is None:
            shutil.rmtree(place)
        if not place.exists():
            beside.rename(place)
    except (OSError, LfmError):
        pass
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def _sum(told: Mapping[str, Any], stored: Path) -> str:
    """sha256 over the numbers and the file of tensors, where there is one."""
    plain = json.loads(json.dumps(told))  # as it is read again
    found = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    if stored.exists():
        with stored.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def ids_digest(*texts: Sequence[Sequence[int]]) -> str:
    """sha256 over rows of ids."""
    return hashlib.sha256(json.dumps([[list(row) for row in rows] for rows in texts]).encode()).hexdigest()


def key_of(here: Setting, edits: Sequence[Edit], run: Run) -> dict[str, Any]:
    """What decides a trial of edits, but for how they are made."""
    return {
        "model": here.digest,
        "edits": digest(edits),
        "setting": [list(here.prefixes), ids_digest(here.text, here.probe)],
        "seed": run.seed,
        **arithmetic(here.module),
    }


def arithmetic(module: nn.Module) -> dict[str, Any]:
    """What decides the last bits of a forward pass."""
    home = next(module.parameters()).device.type
    return {"device": home, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _place(kind: str, key: Mapping[str, Any]) -> Path:
    whole = json.dumps({"kind": kind, "code": _code(), **key}, sort_keys=True)
    return home() / "editing" / f"{kind}-{hashlib.sha256(whole.encode()).hexdigest()[:32]}"


@cache
def _code(sources: Path = Path(__file__).parent.parent) -> str:
    """What all measuring runs on: lfm's sources up to its mechanisms of editing, and the packages of models and tokens.
    What changes them makes anew."""
    found = hashlib.sha256(json.dumps([metadata.version(name) for name in PACKAGES]).encode())
    for file in sorted(file for name in BENEATH for file in (sources / name).rglob("*.py")):
        found.update(file.relative_to(sources).as_posix().encode() + file.read_bytes())
    return found.hexdigest()


def _sweep(folder: Path) -> None:
    for left in folder.glob(".making-*"):
        if time.time() - left.stat().st_mtime > ABANDONED:
            shutil.rmtree(left, ignore_errors=True)
