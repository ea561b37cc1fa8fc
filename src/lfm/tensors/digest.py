"""What identifies a state dict: its names, dtypes, shapes and bytes, and not how it is cut into files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from blake3 import blake3

from lfm.core.heavy import torch
from lfm.tensors import known
from lfm.tensors.lazy import chunks, code_of, is_coded, lazy, size
from lfm.tensors.parallel import each
from lfm.tensors.rooms import room
from lfm.tensors.safetensors_file import DTYPES, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import LazyTensor

BUFFER = 1 << 20
"""Bytes hashed at a time."""


def digest_tensors(tensors: Mapping[str, LazyTensor | Tensor], *, workers: int | None = None) -> str:
    """sha256 over the sorted (name, dtype, shape, BLAKE3 of the little-endian bytes). Stored tensors need no torch.

    Files that have not changed since they were digested are not read again (lfm.tensors.known).
    """
    before = known.recalled(tensors.values())
    fresh: dict[StoredTensor, str] = {}

    def line(name: str) -> tuple[str, str]:
        tensor = tensors[name]
        stored = isinstance(tensor, StoredTensor)
        found = before.get(tensor) if stored else None
        if found is None:
            found = blake3_of(tensor)
            if stored:
                fresh[tensor] = found
        return name, json.dumps([name, code_of(tensor), list(tensor.shape), found])

    lines = dict(each(line, tensors, workers))
    known.keep(fresh)
    return hashlib.sha256("\n".join(lines[name] for name in sorted(lines)).encode()).hexdigest()


def blake3_of(tensor: LazyTensor | Tensor) -> str:
    """BLAKE3 of the little-endian bytes: as safe as sha256, five times as fast on one core."""
    found = blake3()
    if is_coded(tensor):
        whole = size(tensor) * DTYPES[tensor.code][1]
        for start in range(0, whole, BUFFER):
            part = room("hashed", min(BUFFER, whole - start))
            tensor.read_into(part, start)
            found.update(part)
    else:
        for _, values in chunks(lazy(tensor)):
            found.update(values.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
