"""manifest.json: each tensor of a merged model with its hash and what its numbers are like, beside run.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import msgspec

from lfm.core.errors import CorruptError
from lfm.core.finding import Finding
from lfm.core.model import LazyTensor, Model, Weights
from lfm.record import Verified
from lfm.tensors import known
from lfm.tensors.digest import BUFFER, sha256_of
from lfm.tensors.lazy import Coded
from lfm.tensors.parallel import each
from lfm.tensors.safetensors_file import DTYPES, StoredTensor

if TYPE_CHECKING:
    from lfm.runs.execute import Prepared

MANIFEST = "manifest.json"


@final
class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One tensor. Numbers are of its finite elements, in fp64; change: ‖θ − θ_base‖₂, where it has a base.

    sha256: of its little-endian bytes. zeros: the share of its elements; nonfinite: how many are NaN or infinite.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
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


def write(saved: Model | Finding, base: Mapping[str, LazyTensor], verified: Verified, directory: Path) -> str:
    """The manifest of a model whose weights were streamed and held against the file's bit for bit; its name, or "".

    It hashes the tensors, which the model's digest then need not do, and looks at them while they are in cache.
    """
    if isinstance(saved, Finding) or saved.kind != "checkpoint" or verified.quantity != "weight":
        return ""
    tensors = saved.ask(Weights).tensors()
    entries = {e.name: e for e in each(lambda name: entry(name, tensors[name], base.get(name)), tensors)}
    with known.told({t: entries[name].sha256 for name, t in tensors.items() if isinstance(t, StoredTensor)}):
        digest = saved.digest
    whole = Manifest(digest=digest, tensors=tuple(entries[name] for name in sorted(entries)))
    (directory / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(whole), indent=1) + b"\n")
    return MANIFEST


def read(directory: Path) -> Manifest:
    """The manifest of a run directory. CorruptError where it is malformed."""
    try:
        return msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise CorruptError(f"{directory / MANIFEST} is not a manifest", why=str(error)) from None


def entry(name: str, tensor: LazyTensor, base: Any = None) -> Entry:
    """What is told of one stored tensor, in one pass over its bytes and, where there is one, its base's."""
    from lfm.fusing.statistics import Tally, readable

    assert isinstance(tensor, StoredTensor), name
    told: dict[str, Any] = {"name": name, "dtype": DTYPES[tensor.code][0], "shape": tensor.shape}
    if not readable(tensor.code):
        return Entry(**told, sha256=sha256_of(tensor))
    beside = base if isinstance(base, Coded) and readable(base.code) and tuple(base.shape) == tensor.shape else None
    tally = Tally(tensor.code, beside.code if beside else None)
    room = bytearray(min(BUFFER // tensor.itemsize, tensor.size) * DTYPES[beside.code][1] if beside else 0)

    def look(part: memoryview, offset: int) -> None:
        other = None
        if beside is not None:
            item = DTYPES[beside.code][1]
            other = memoryview(room)[: len(part) // tensor.itemsize * item]
            beside.read_into(other, offset // tensor.itemsize * item)
        tally.add(part, other)

    return Entry(**told, sha256=sha256_of(tensor, look), **tally.statistics()._asdict())
