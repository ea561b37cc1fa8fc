"""Finding weights that are not numbers before they spoil what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lfm.core.heavy import torch
from lfm.tensors.lazy import chunks, lazy
from lfm.tensors.parallel import each

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.model import LazyTensor


def finite(values: Tensor) -> bool:
    """Whether every element is a finite number; integers are."""
    if not values.numel() or not (values.is_floating_point() or values.is_complex()):
        return True
    if values.is_complex():
        values = torch.view_as_real(values)
    if values.dtype.itemsize == 1:
        values = values.float()
    low, high = torch.aminmax(values)  # one pass, no temporary; NaN goes through
    return bool(torch.isfinite(low) & torch.isfinite(high))


def find_nonfinite(tensors: Mapping[str, LazyTensor | Tensor], *, workers: int | None = None) -> str | None:
    """The name of the first tensor (by name) that holds a NaN or an infinity, or None. Streams."""

    def bad(name: str) -> str | None:
        return name if not all(finite(values) for _, values in chunks(lazy(tensors[name]))) else None

    return min((name for name in each(bad, tensors, workers) if name is not None), default=None)
