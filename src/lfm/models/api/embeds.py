"""Input embeddings as text: base64 of safetensors, and (reading only) of torch.save, which is never unpickled."""

from __future__ import annotations

import base64
import binascii
import io
import math
import pickletools
import zipfile
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.errors import DataError, LfmError, UnsafeError
from lfm.core.heavy import safetensors, safetensors_torch, torch
from lfm.tensors.safetensors_file import DTYPES, FLOATING, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

NAME = "embeds"
LARGEST = 2**28
"""Bytes of one sequence of embeddings."""


def encode(embeds: Tensor) -> str:
    """(t, d) as base64 of a safetensors file with one fp32 tensor."""
    plain = embeds.detach().to("cpu", torch.float32).contiguous()
    return base64.b64encode(safetensors_torch.save({NAME: plain})).decode("ascii")


def decode(text: str) -> Tensor:
    """(t, d) fp32 from base64 of safetensors, or of torch.save as vLLM's client sends it. DataError or UnsafeError."""
    if len(text) > LARGEST * 4 // 3 + 4:
        raise DataError(f"embeddings of more than {LARGEST // 2**20} MiB")
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DataError("embeddings are not base64", fix="send base64 of a safetensors file or of torch.save") from None
    tensor = _from_zip(raw) if raw[:2] == b"PK" else from_safetensors(raw)
    if tensor.dim() == 3 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise DataError(f"embeddings have shape {tuple(tensor.shape)}", fix="send (tokens, width)")
    if not bool(torch.isfinite(tensor).all()):
        raise DataError("embeddings hold NaN or infinity")
    return tensor


def from_safetensors(raw: bytes) -> Tensor:
    """The only tensor of a safetensors file in memory, fp32."""
    try:
        held = safetensors.deserialize(raw)
    except Exception as error:  # the library's error type is not public, and a short file raises others
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError("embeddings are neither safetensors nor torch.save", why=first) from None
    if len(held) != 1:
        raise DataError(f"a safetensors file with {len(held)} tensors", fix="send one tensor")
    _, told = held[0]
    if told["dtype"] not in FLOATING:
        known, _ = DTYPES.get(told["dtype"], (told["dtype"], 0))
        raise DataError(f"embeddings are {known}", fix="send a floating-point tensor")
    flat = torch.frombuffer(bytearray(told["data"]), dtype=torch.uint8) if told["data"] else torch.empty(0).byte()
    return flat.view(torch_dtype(told["dtype"])).reshape(told["shape"]).float()


class _Name(NamedTuple):
    """A global that a pickle names. It is compared, never imported."""

    name: str


class _Call(NamedTuple):
    """A call that a pickle asks for. It is compared, never made."""

    function: Any
    arguments: Any


class _Stored(NamedTuple):
    """A persistent id."""

    id: Any


_MARK = object()
_STORAGES = {
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch DoubleStorage": "float64",
}
_REBUILD = _Name("torch._utils _rebuild_tensor_v2")
_NO_HOOKS = _Call(_Name("collections OrderedDict"), ())


def _from_zip(raw: bytes) -> Tensor:
    """The tensor in a torch.save archive whose pickle says "one plain tensor" and nothing else."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            stem = next((name.removesuffix("data.pkl") for name in sizes if name.endswith("/data.pkl")), None)
            if stem is None:
                raise UnsafeError("that archive is not one of torch.save", fix="send base64 of a safetensors file")
            if sum(sizes.values()) > LARGEST or sizes[stem + "data.pkl"] > 4096:
                raise DataError("the archive of embeddings is too large")
            order = archive.read(stem + "byteorder") if stem + "byteorder" in sizes else b"little"
            shape, stride, offset, dtype, key = _one_tensor(archive.read(stem + "data.pkl"))
            data = archive.read(f"{stem}data/{key}")
    except LfmError:
        raise
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, OSError, RuntimeError) as error:
        raise DataError("the torch.save archive is damaged", why=str(error)) from None
    if order != b"little":
        raise DataError("the torch.save archive is big-endian", fix="send base64 of a safetensors file")
    kind = getattr(torch, dtype)
    last = offset + sum((side - 1) * step for side, step in zip(shape, stride))
    if not data or (last + 1) * kind.itemsize > len(data) or math.prod(shape) * 4 > LARGEST:
        raise DataError("the torch.save archive claims a tensor larger than its data")
    flat = torch.frombuffer(bytearray(data), dtype=kind)
    return flat.as_strided(shape, stride, offset).to(torch.float32).contiguous()


def _one_tensor(pickled: bytes) -> tuple[tuple[int, ...], tuple[int, ...], int, str, str]:
    """(shape, stride, offset, dtype, storage key) if the pickle rebuilds one plain tensor, else UnsafeError."""
    match _read(pickled):
        case _Call(
            function=function,
            arguments=(
                _Stored(id=("storage", _Name(name=storage), str(key), str(), int())),
                int(offset),
                tuple(shape),
                tuple(stride),
                bool(),
                hooks,
            ),
        ) if (
            function == _REBUILD
            and hooks == _NO_HOOKS
            and storage in _STORAGES
            and key.isalnum()
            and len(shape) == len(stride)
            and offset >= 0
            and all(isinstance(n, int) and n > 0 for n in shape)
            and all(isinstance(n, int) and n >= 0 for n in stride)
        ):
            return shape, stride, offset, _STORAGES[storage], key
    raise _unsafe("it does not hold one plain floating-point tensor")


def _read(pickled: bytes) -> Any:
    """What the pickle would build, as inert values: nothing is imported and nothing is called."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "GLOBAL":
                    stack.append(_Name(str(argument)))
                case "MARK":
                    stack.append(_MARK)
                case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                    stack.append(argument)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode.name == "NEWTRUE")
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "TUPLE":
                    start = len(stack) - 1 - stack[::-1].index(_MARK)
                    stack[start:] = [tuple(stack[start + 1 :])]
                case "BINPUT" | "LONG_BINPUT":
                    memo[int(argument)] = stack[-1]  # type: ignore[arg-type]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[int(argument)])  # type: ignore[arg-type]
                case "BINPERSID":
                    stack.append(_Stored(stack.pop()))
                case "REDUCE":
                    arguments = stack.pop()
                    stack.append(_Call(stack.pop(), arguments))
                case "STOP":
                    break
                case other:
                    raise _unsafe(f"it uses the opcode {other}")
        (whole,) = stack
    except (IndexError, KeyError, ValueError, UnicodeDecodeError):
        raise _unsafe("it is malformed") from None
    return whole


def _unsafe(why: str) -> UnsafeError:
    return UnsafeError(
        "the pickle in that torch.save archive is not read", why=why, fix="send base64 of a safetensors file"
    )
