"""Rows: a tensor's runs along its last dimension; a vector is one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lfm.core.model import LazyTensor


def row_width(tensors: Mapping[str, LazyTensor]) -> Callable[[str], int]:
    """By name, how many elements a tensor's row has."""
    return lambda name: tensors[name].shape[-1] if tensors[name].shape else 1
