"""Tensors that are computed when asked: over inputs read in chunks, so that no whole tensor is ever held."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeGuard, final
from typing import cast as cast_type

from lfm.core.errors import CorruptError
from lfm.core.heavy import torch
from lfm.tensors.refusal import MEND, nonfinite_refused
from lfm.tensors.safetensors_file import FLOATING, dtype_code, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import LazyTensor

CHUNK = 1 << 19
"""Elements read, computed and written at a time: few enough for the caches, enough that Python is not what waits."""


class Chunked(Protocol):
    """A LazyTensor that can be read in part."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self) -> Tensor: ...

    def read_flat(self, start: int, stop: int) -> Tensor:
        """Elements start to stop of the tensor laid out flat (row-major)."""
        ...


class Coded(Protocol):
    """A LazyTensor whose bytes can be had as a file would hold them, without torch."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def code(self) -> str:
        """Its dtype as the format writes it."""
        ...

    def read_into(self, buffer: memoryview, offset: int = 0) -> None:
        """Fill a buffer with its bytes from `offset`: whole elements, laid out flat (row-major)."""
        ...


def is_coded(tensor: object) -> TypeGuard[Coded]:
    """Whether it is Coded: asked thousands of times, and isinstance of a Protocol takes microseconds."""
    return hasattr(type(tensor), "read_into")


def is_chunked(tensor: object) -> TypeGuard[Chunked]:
    """Whether it is Chunked."""
    return hasattr(type(tensor), "read_flat")


@final
@dataclass(frozen=True)
class AsStored:
    """Any LazyTensor, as one whose bytes can be had; in another floating format if `code` is not its own."""

    tensor: LazyTensor
    code: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def file(self) -> object:
        return getattr(self.tensor, "file", type(self.tensor).__name__)

    def read_into(self, buffer: memoryview, offset: int = 0) -> None:
        dtype = torch_dtype(self.code)
        start, stop = offset // dtype.itemsize, (offset + len(buffer)) // dtype.itemsize
        if is_chunked(self.tensor):
            values = self.tensor.read_flat(start, stop)
        else:
            values = _whole(self.tensor).reshape(-1)[start:stop]
        buffer[:] = values.to(dtype).contiguous().view(torch.uint8).numpy().data


_read = threading.local()


def _whole(tensor: LazyTensor) -> Tensor:
    """A tensor that can only be read whole; this thread's last one is kept, for its parts are asked for in turn."""
    if getattr(_read, "tensor", None) is not tensor:
        _read.tensor, _read.values = tensor, tensor.read()
    return _read.values


def code_of(tensor: LazyTensor | Tensor) -> str:
    """The format's code of a tensor's dtype; no torch for one that knows it."""
    code = getattr(tensor, "code", None)  # asked thousands of times: isinstance of a Protocol takes microseconds
    return code if isinstance(code, str) else dtype_code(tensor.dtype)


def coded(tensor: LazyTensor, codes: Container[str] | None = None) -> Coded:
    """The tensor as one whose bytes can be had; as fp32 if its own format is not among `codes`."""
    code = code_of(tensor)
    if codes is not None and code not in codes:
        return AsStored(tensor, "F32")
    return tensor if is_coded(tensor) else AsStored(tensor, code)


@final
@dataclass(frozen=True)
class Held:
    """A tensor in memory, as a LazyTensor."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> Tensor:
        return self.tensor.detach().cpu()

    def read_flat(self, start: int, stop: int) -> Tensor:
        return self.tensor.detach().reshape(-1)[start:stop].cpu()


@final
@dataclass(frozen=True)
class Computed:
    """An elementwise result: fn(start, stop) gives its flat elements, wherever the cuts fall. Stored as dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fn: Callable[[int, int], Tensor]

    def read(self) -> Tensor:
        out = torch.empty(prod(self.shape), dtype=self.dtype)
        for start, stop in spans(len(out)):
            out[start:stop] = self.read_flat(start, stop)
        return out.reshape(self.shape)

    def read_flat(self, start: int, stop: int) -> Tensor:
        return self.fn(start, stop).to(self.dtype)


@final
@dataclass(frozen=True)
class Whole:
    """A result that needs whole tensors: fn() gives it. Stored as dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fn: Callable[[], Tensor]

    def read(self) -> Tensor:
        return self.fn().to(self.dtype).reshape(self.shape)


def lazy(tensor: LazyTensor | Tensor) -> LazyTensor:
    """A LazyTensor of either."""
    if not is_coded(tensor) and isinstance(tensor, torch.Tensor):  # no torch where it is not needed
        return Held(tensor.detach().contiguous())
    return cast_type("LazyTensor", tensor)


def size(tensor: LazyTensor | Tensor | Coded) -> int:
    """Number of elements."""
    return prod(tensor.shape)


def spans(size: int, chunk: int = CHUNK) -> Iterator[tuple[int, int]]:
    """(start, stop) pairs that cover `size` elements."""
    for start in range(0, size, chunk):
        yield start, min(start + chunk, size)


def chunks(tensor: LazyTensor, chunk: int = CHUNK) -> Iterator[tuple[int, Tensor]]:
    """(start, flat elements) of a tensor in order; one that can only be read whole is read once."""
    if is_chunked(tensor):
        for start, stop in spans(size(tensor), chunk):
            yield start, tensor.read_flat(start, stop)
    else:
        yield 0, tensor.read().reshape(-1)


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


def widen(tensor: Tensor) -> Tensor:
    """fp32, or fp64 where it is stored so: what arithmetic is done in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def cast(tensor: LazyTensor, dtype: torch.dtype | None) -> LazyTensor:
    """The tensor stored as dtype, converted as it is read; one that is not floating, or of that dtype, as it is."""
    if dtype is None or code_of(tensor) == dtype_code(dtype) or code_of(tensor) not in FLOATING:
        return tensor
    if is_chunked(tensor):
        return Computed(tuple(tensor.shape), dtype, tensor.read_flat)
    return Whole(tuple(tensor.shape), dtype, tensor.read)


def map_tensors(
    names: Iterable[str],
    fn: Callable[..., Tensor],
    sources: Sequence[Mapping[str, LazyTensor]],
    *,
    like: Mapping[str, LazyTensor] | None = None,
) -> dict[str, LazyTensor]:
    """fn(name, *chunks) for each name, elementwise over the sources' flat chunks in fp32, which fn leaves as they are.

    Shapes are equal over the sources; the result's dtypes are those of `like`, or else of the first source. Nothing is
    read until the result is: CorruptError, then, where it is not finite (unless lfm.tensors.refusal lets it through).
    """
    like = like or sources[0]
    return {name: _mapped(name, fn, [source[name] for source in sources], like[name].dtype) for name in names}


def parts(inputs: Sequence[LazyTensor], chunk: int = CHUNK) -> Iterator[Callable[[], list[Tensor]]]:
    """The inputs' flat chunks side by side, in fp32, read when called; all at once if one can only be read whole."""
    readers = [tensor for tensor in inputs if is_chunked(tensor)]
    if len(readers) < len(inputs):
        yield lambda: [widen(tensor.read().reshape(-1)) for tensor in inputs]
    else:
        for span in spans(size(inputs[0]), chunk):
            yield lambda span=span: [widen(reader.read_flat(*span)) for reader in readers]


def _mapped(name: str, fn: Callable[..., Tensor], inputs: Sequence[LazyTensor], dtype: torch.dtype) -> LazyTensor:
    shape = tuple(inputs[0].shape)
    assert all(tuple(tensor.shape) == shape for tensor in inputs), name
    strict = nonfinite_refused()

    def result(*values: Tensor) -> Tensor:
        out = fn(name, *map(widen, values)).to(dtype)
        if strict and not finite(out):
            _refuse(name, values, inputs, dtype)
        return out

    readers = [tensor for tensor in inputs if is_chunked(tensor)]
    if len(readers) < len(inputs):
        return Whole(shape, dtype, lambda: result(*(tensor.read().reshape(-1) for tensor in inputs)))
    return Computed(shape, dtype, lambda start, stop: result(*(reader.read_flat(start, stop) for reader in readers)))


def _refuse(name: str, values: Sequence[Tensor], inputs: Sequence[LazyTensor], dtype: torch.dtype) -> NoReturn:
    for i, value in enumerate(values):
        if not finite(value):
            where = getattr(inputs[i], "file", f"input {i + 1}")
            raise CorruptError(f"{where}: {name!r} holds a NaN or an infinity", fix=MEND)
    raise CorruptError(
        f"{name!r} leaves the range of {dtype} when computed", why="its inputs are finite", fix="use smaller weights"
    )
