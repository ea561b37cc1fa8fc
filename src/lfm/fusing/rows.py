"""Rows: a tensor's runs along its last dimension; a vector is one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from lfm.core.heavy import np, torch
from lfm.fusing import kernel
from lfm.fusing.engine import key_of
from lfm.tensors.lazy import Coded, coded, size
from lfm.tensors.safetensors_file import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.model import LazyTensor


def row_width(tensors: Mapping[str, LazyTensor]) -> Callable[[str], int]:
    """By name, how many elements a tensor's row has."""
    return lambda name: tensors[name].shape[-1] if tensors[name].shape else 1


@final
@dataclass(frozen=True)
class ByRow:
    """What fn makes of the rows of a model's changes: a LazyTensor in fp64, computed as it is read, by whole rows.

    fn(changes, first): fp64 (rows, width), and the number of its first element in the tensor.
    """

    base: Coded
    model: Coded
    fn: Callable[[Any, int], Any]

    code = "F64"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def file(self) -> object:
        return getattr(self.model, "file", "a model")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    def read(self) -> Tensor:
        out = np.empty(size(self.base))
        self.read_into(out.view(np.uint8).data)
        return torch.from_numpy(out).reshape(self.shape)

    def read_into(self, buffer: memoryview, offset: int = 0) -> None:
        """Rows that a cut goes through are computed on both of its sides."""
        start, stop = offset // 8, (offset + len(buffer)) // 8
        if stop == start:
            return
        width = self.shape[-1] if self.shape else 1
        first, last = start // width * width, -(-stop // width) * width
        changes = _read(self.model, first, last) - _read(self.base, first, last)
        found = self.fn(changes.reshape(-1, width), first).reshape(-1)
        buffer[:] = np.ascontiguousarray(found[start - first : stop - first]).view(np.uint8).data


def by_row(base: LazyTensor, model: LazyTensor, fn: Callable[[Any, int], Any]) -> LazyTensor:
    """fn of the rows of a model's changes from the base, lazily."""
    return ByRow(coded(base, kernel.CODES), coded(model, kernel.CODES), fn)


def uniform(seed: int, model: int, name: str, start: int, count: int) -> Any:
    """The numbers in [0, 1) that a kernel's `random` has for these elements (lfm.fusing.bits.uniform)."""
    with np.errstate(over="ignore"):
        z = np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(key_of(seed, model, name))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def ranks(values: Any) -> Any:
    """Each entry's place in its row by magnitude in fp32, from 0; of equals the first has the lower."""
    rows, width = values.shape
    keys = np.abs(values).astype(np.float32).view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(width, dtype=np.uint64)
    keys.sort(axis=1)
    order = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    found = np.empty((rows, width), dtype=np.int64)
    np.put_along_axis(found, order, np.arange(width)[None, :].repeat(rows, axis=0), axis=1)
    return found


def _read(tensor: Coded, start: int, stop: int) -> Any:
    item = DTYPES[tensor.code][1]
    raw = np.empty((stop - start) * item, dtype=np.uint8)
    tensor.read_into(raw.data, start * item)
    if tensor.code == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.view({"F64": np.float64, "F32": np.float32, "F16": np.float16}[tensor.code]).astype(np.float64)
