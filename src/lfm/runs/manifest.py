"""manifest.json: each tensor of a merged model with its hash and what its numbers are like, beside run.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import msgspec
from blake3 import blake3

from lfm.core.errors import CorruptError
from lfm.core.finding import Finding
from lfm.core.interfaces import LazyTensor, Weights
from lfm.core.model import Model
from lfm.record import Verified
from lfm.tensors import known
from lfm.tensors.lazy import is_coded
from lfm.tensors.readback import Seen, Written
from lfm.tensors.rooms import room
from lfm.tensors.safetensors_file import DTYPES, StoredTensor

if TYPE_CHECKING:
    from lfm.runs.execute import Prepared

MANIFEST = "manifest.json"


@final
class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One tensor. Numbers are of its finite elements, in fp64; change: ‖θ − θ_base‖₂, where it has a base.

    blake3: of its little-endian bytes. zeros: the share of its elements; nonfinite: how many are NaN or infinite.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blake3: str
    norm: float | None = None
    min: float | None = None
    max: float | None = None
    mean: float | None = None
    zeros: float | None = None
    nonfinite: int = 0
    change: float | None = None


@final
class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A model's digest, and its tensors by name."""

    digest: str
    tensors: tuple[Entry, ...]


def begun(prepared: Prepared) -> Mapping[str, LazyTensor]:
    """What each tensor of the result is a change of; nothing where there is no base."""
    method, inputs = prepared.listed.method, prepared.inputs
    if method.origin is not None:
        return method.origin(prepared.config, inputs)
    return next((m.ask(Weights).tensors() for m in inputs.all("base") if m.can(Weights)), {})


@final
class Looks:
    """What each tensor that is read back is like, and how far from its base, found while its bytes are in cache."""

    def __init__(self, base: Mapping[str, LazyTensor]) -> None:
        self._base = base
        self._tensors: dict[str, _Tensor] = {}

    def of(self, tensor: Written) -> Callable[[memoryview, int], None]:
        """What wants the parts of a tensor, in order."""
        self._tensors[tensor.name] = _Tensor(tensor, self._base.get(tensor.name))
        return self._tensors[tensor.name].add

    def entries(self) -> list[Entry]:
        """What was found, by the tensors' names."""
        return [self._tensors[name].entry() for name in sorted(self._tensors)]


@final
class _Tensor:
    def __init__(self, tensor: Written, base: Any) -> None:
        from lfm.fusing.statistics import Tally, readable

        self._told, self._hash = tensor, blake3()
        suits = is_coded(base) and readable(base.code) and tuple(base.shape) == tensor.shape
        self._base: Any = base if suits and readable(tensor.code) else None
        self._tally = Tally(tensor.code, self._base.code if self._base else None) if readable(tensor.code) else None

    def add(self, part: memoryview, offset: int) -> None:
        self._hash.update(part)
        if self._tally is not None:
            self._tally.add(part, self._beside(len(part), offset) if self._base else None)

    def _beside(self, bytes_: int, offset: int) -> memoryview:
        item, mine = DTYPES[self._base.code][1], DTYPES[self._told.code][1]
        other = room("base", bytes_ // mine * item)
        self._base.read_into(other, offset // mine * item)
        return other

    def entry(self) -> Entry:
        found = self._tally.statistics()._asdict() if self._tally else {}
        name, code, shape, *_ = self._told
        return Entry(name=name, dtype=DTYPES[code][0], shape=shape, blake3=self._hash.hexdigest(), **found)


def write(saved: Model | Finding, looks: Looks, seen: Seen, verified: Verified, directory: Path) -> str:
    """The manifest of a model whose weights were streamed and read back; its name, or "".

    The tensors were hashed as they were read, which the model's digest then need not do.
    """
    if isinstance(saved, Finding) or saved.kind != "checkpoint" or verified.quantity != "weight":
        return ""
    tensors = saved.ask(Weights).tensors()
    if not all(seen.holds(name, tensor) for name, tensor in tensors.items()):
        return ""
    entries = looks.entries()
    with known.told({t: entry.blake3 for entry in entries if isinstance(t := tensors[entry.name], StoredTensor)}):
        digest = saved.digest
    whole = Manifest(digest=digest, tensors=tuple(entries))
    (directory / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(whole), indent=1) + b"\n")
    return MANIFEST


def read(directory: Path) -> Manifest:
    """The manifest of a run directory. CorruptError where it is malformed."""
    try:
        return msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise CorruptError(f"{directory / MANIFEST} is not a manifest", why=str(error)) from None
