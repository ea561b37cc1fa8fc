"""Rows: a tensor's runs along its last dimension; a vector is one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from lfm.core.heavy import np, torch
from lfm.fusing import kernel
from lfm.fusing.engine import key_of
from lfm.tensors.lazy import CHUNK, Coded, coded, size, spans
from lfm.tensors.safetensors_file import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import LazyTensor


def row_width(tensors: Mapping[str, LazyTensor]) -> Callable[[str], int]:
    """By name, how many elements a tensor's row has."""
    return lambda name: tensors[name].shape[-1] if tensors[name].shape else 1


@final
@dataclass(frozen=True)
class ByRow:
    """What fn makes of the rows of a model's changes: a LazyTensor in fp64, computed as it is read, by whole rows.

    fn(changes, first): fp64 (rows, width), and the number of its first element in the tensor.
    """

    base: Coded | None
    model: Coded
    fn: Callable[[Any, int], Any]

    code = "F64"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.model.shape)

    @property
    def file(self) -> object:
        return getattr(self.model, "file", "a model")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    def read(self) -> Tensor:
        out = np.empty(size(self.model))
        self.read_into(out.view(np.uint8).data)
        return torch.from_numpy(out).reshape(self.shape)

    def read_into(self, buffer: memoryview, offset: int = 0) -> None:
        """Rows that a cut goes through are computed on both of its sides."""
        start, stop = offset // 8, (offset + len(buffer)) // 8
        if stop == start:
            return
        width = self.shape[-1] if self.shape else 1
        first, last = start // width * width, -(-stop // width) * width
        changes = values(self.model, first, last)
        if self.base is not None:
            changes = changes - values(self.base, first, last)
        found = self.fn(changes.reshape(-1, width), first).reshape(-1)
        buffer[:] = np.ascontiguousarray(found[start - first : stop - first]).view(np.uint8).data


def by_row(base: LazyTensor | None, model: LazyTensor, fn: Callable[[Any, int], Any]) -> LazyTensor:
    """fn of the rows of a model's changes from the base, or of its own rows, lazily."""
    return ByRow(coded(base, kernel.CODES) if base is not None else None, coded(model, kernel.CODES), fn)


def column_gram(base: LazyTensor | None, models: Sequence[LazyTensor]) -> Any:
    """fp64 (columns, n, n): inner products of the models' (changes') columns, which run along the first dimension."""
    given = [coded(t, kernel.CODES) for t in ([base] if base is not None else []) + [*models]]
    height = models[0].shape[0] if models[0].shape else 1
    width, count = size(models[0]) // max(1, height), len(models)
    total = np.zeros((width, count, count))
    for begin, end in spans(width):
        step = max(1, CHUNK // (end - begin)) if end - begin == width else 1
        for row in range(0, height, step):
            rows = min(step, height - row)
            read = [values(t, row * width + begin, (row + rows - 1) * width + end).reshape(rows, -1) for t in given]
            changes = np.stack([r - read[0] for r in read[1:]] if base is not None else read)
            total[begin:end] += np.einsum("irc,jrc->cij", changes, changes)
    return total


def by_column(base: LazyTensor | None, model: LazyTensor, factors: Any) -> LazyTensor:
    """A model's changes from the base, or its own entries, each column multiplied by its factor (columns,), lazily."""

    def fn(changes: Any, first: int) -> Any:
        at = (first + np.arange(changes.size)) % len(factors)
        return changes * factors[at].reshape(changes.shape)

    return by_row(base, model, fn)


def uniform(seed: int, model: int, name: str, start: int, count: int) -> Any:
    """The numbers in [0, 1) that a kernel's `random` has for these elements (lfm.tensors.bits.uniform)."""
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


def values(tensor: Coded, start: int, stop: int) -> Any:
    """Elements start to stop, fp64."""
    item = DTYPES[tensor.code][1]
    raw = np.empty((stop - start) * item, dtype=np.uint8)
    tensor.read_into(raw.data, start * item)
    if tensor.code == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.view({"F64": np.float64, "F32": np.float32, "F16": np.float16}[tensor.code]).astype(np.float64)
