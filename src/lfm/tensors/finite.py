"""Finding weights that are not numbers before they spoil what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lfm.tensors.lazy import chunks, finite, lazy
from lfm.tensors.parallel import each

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import LazyTensor


def find_nonfinite(tensors: Mapping[str, LazyTensor | Tensor], *, workers: int | None = None) -> str | None:
    """The name of the first tensor (by name) that holds a NaN or an infinity, or None. Streams."""

    def bad(name: str) -> str | None:
        return name if not all(finite(values) for _, values in chunks(lazy(tensors[name]))) else None

    return min((name for name in each(bad, tensors, workers) if name is not None), default=None)
