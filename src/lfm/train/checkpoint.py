"""A training loop's own checkpoint: one safetensors file, with plain facts in its header. Whole or not there at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm.core.errors import CorruptError
from lfm.core.heavy import safetensors, safetensors_torch

if TYPE_CHECKING:
    from torch import Tensor

FILE = "checkpoint.safetensors"


def write(directory: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Replace the directory's checkpoint; a kill at any moment leaves the old one or the new one."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / (FILE + ".partial")
    for stray in directory.glob(".tmp*"):  # where safetensors was killed as it wrote: as large as a checkpoint, each
        stray.unlink()
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors_torch.save_file(kept, str(partial), metadata={"facts": json.dumps(dict(facts))})
    _sync(partial)
    partial.replace(directory / FILE)
    _sync(directory)


def read(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The checkpoint's tensors and facts; None where there is none. CorruptError if it cannot be read."""
    path = directory / FILE
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CorruptError(
            f"{path} is not a checkpoint", why=str(error), fix="remove it, and this training starts from its beginning"
        ) from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
