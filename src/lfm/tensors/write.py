"""Writing .safetensors files of any size: the header first, then bytes streamed to where they belong."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from lfm.core.errors import OutputError
from lfm.core.heavy import torch
from lfm.tensors import readback
from lfm.tensors.filecache import to_disk
from lfm.tensors.lazy import CHUNK, cast, code_of, is_chunked, is_coded, lazy, size, spans
from lfm.tensors.parallel import each
from lfm.tensors.readback import Written
from lfm.tensors.rooms import room
from lfm.tensors.safetensors_file import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import LazyTensor

T = TypeVar("T")

FORMAT: Mapping[str, str] = {"format": "pt"}
"""Metadata that transformers requires of a file."""


SHARD = "LFM_MAX_SHARD_SIZE"
"""Bytes of a file of weights, at most, unless a single tensor is larger."""


class _Planned(NamedTuple):
    """One file before it is written: its header, and each tensor with where it will lie."""

    path: Path
    header: bytes
    places: tuple[tuple[LazyTensor, Written], ...]
    bytes: int


def write_tensors(
    out_dir: Path,
    tensors: Mapping[str, LazyTensor | Tensor],
    *,
    metadata: Mapping[str, str] = FORMAT,
    max_shard_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    stem: str = "model",
    chunk: int = CHUNK,
    workers: int | None = None,
) -> tuple[Path, ...]:
    """Write STEM.safetensors, or shards and an index named as transformers names them; returns the files.

    max_shard_bytes: 5 GB, or what LFM_MAX_SHARD_SIZE says. dtype: what floating tensors are cast to. Memory holds a few
    chunks a worker, however large a tensor is. Files appear by rename once all their bytes are on the disk, the index
    last. OutputError (and nothing left) if one exists already or cannot be written. The bytes are those that
    safetensors itself would write.
    """
    held = {name: cast(lazy(tensor), dtype) for name, tensor in tensors.items()}
    groups = _shards(held, max_shard_bytes or int(os.environ.get(SHARD) or 5_000_000_000))
    count = len(groups)
    if count == 1:
        names = [f"{stem}.safetensors"]
    else:
        names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    index = out_dir / f"{stem}.safetensors.index.json"
    finals = [out_dir / name for name in names]
    for path in (*finals, out_dir / f"{stem}.safetensors", index):
        if path.exists():
            raise OutputError(f"{path} exists already", fix="write to an empty directory")
    plans = [_plan(path.with_name(path.name + ".partial"), group, metadata) for path, group in zip(finals, groups)]
    made: list[Path] = []
    try:
        for plan in plans:
            made.append(plan.path)
            _write(plan, chunk, workers)
        if count > 1:
            weight_map = {name: file for file, group in zip(names, groups) for name in group}
            total = sum(plan.bytes - len(plan.header) for plan in plans)
            content = {
                "metadata": {"total_parameters": sum(size(t) for t in held.values()), "total_size": total},
                "weight_map": weight_map,
            }
            made.append(index.with_name(index.name + ".partial"))
            _write_text(made[-1], json.dumps(content, indent=2, sort_keys=True) + "\n")
            finals.append(index)
        for i, final in enumerate(finals):
            made[i] = _rename(made[i], final)
        _sync_directory(out_dir)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    return tuple(finals)


def _shards(tensors: Mapping[str, LazyTensor], limit: int) -> list[dict[str, LazyTensor]]:
    """In the given order, each file filled until the next tensor would exceed the limit; a larger one goes alone."""
    groups: list[dict[str, LazyTensor]] = []
    filling: dict[str, LazyTensor] = {}
    filled = 0
    for name, tensor in tensors.items():
        bytes_ = size(tensor) * DTYPES[code_of(tensor)][1]
        if bytes_ > limit:
            groups.append({name: tensor})
            continue
        if filled + bytes_ > limit:
            groups.append(filling)
            filling, filled = {}, 0
        filling[name] = tensor
        filled += bytes_
    return [*groups, filling] if filling or not groups else groups


def _plan(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> _Planned:
    codes = {name: code_of(tensor) for name, tensor in tensors.items()}
    by_alignment = list(DTYPES)  # the format's own order; safetensors writes the last of these first, then by name
    order = sorted(tensors, key=lambda name: (-by_alignment.index(codes[name]), name.encode()))
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at, places = 0, []
    for name in order:
        shape = tuple(tensors[name].shape)
        end = at + prod(shape) * DTYPES[codes[name]][1]
        places.append(Written(name, codes[name], shape, at, end))
        entries[name] = {"dtype": codes[name], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    shift = len(header)
    moved = (place._replace(begin=place.begin + shift, end=place.end + shift) for place in places)
    return _Planned(path, header, tuple((tensors[place.name], place) for place in moved), shift + at)


def _write(plan: _Planned, chunk: int, workers: int | None) -> None:
    path = plan.path
    fd = _attempt(path, lambda: os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
    try:
        _attempt(path, lambda: _reserve(fd, plan.bytes))
        _attempt(path, lambda: _put(fd, memoryview(plan.header), 0))

        behind, reading = to_disk(fd), readback.begun(path)

        def put(place: Written, at: int, data: memoryview) -> None:
            _attempt(path, lambda: _put(fd, data, at))
            behind(at, len(data))
            if reading:
                reading.wrote(place, at, data)

        def piece(tensor: LazyTensor, place: Written, start: int, stop: int) -> None:
            item = DTYPES[place.code][1]
            if is_coded(tensor):
                raw = room("written", (stop - start) * item)
                tensor.read_into(raw, start * item)
                put(place, place.begin + start * item, raw)
                return
            if is_chunked(tensor):
                values = tensor.read_flat(start, stop)
            else:
                values = tensor.read().reshape(-1)
            assert len(values) == stop - start and values.dtype == tensor.dtype
            data = values.contiguous().view(torch.uint8).numpy().data
            for first, last in spans(len(data), chunk * item):
                put(place, place.begin + start * item + first, data[first:last])

        for _, place in plan.places:
            if place.begin == place.end:
                put(place, place.begin, memoryview(b""))
        for _ in each(lambda task: piece(*task), _pieces(plan, chunk), workers):
            pass
        _attempt(path, lambda: os.fsync(fd))
        if reading:
            reading.settle(fd)
    finally:
        os.close(fd)


def _pieces(plan: _Planned, chunk: int) -> Iterator[tuple[LazyTensor, Written, int, int]]:
    """(tensor, its place, start, stop): chunks, or all of a tensor that can only be read whole."""
    for tensor, place in plan.places:
        elements = size(tensor)
        parts = any(can(tensor) for can in (is_chunked, is_coded))
        for start, stop in spans(elements, chunk if parts else max(1, elements)):
            yield tensor, place, start, stop


def _put(fd: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], at + done)


def _reserve(fd: int, bytes_: int) -> None:
    """Take the disk space now, so that a full disk is met before the work and not at its end."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, bytes_)
    else:
        os.ftruncate(fd, bytes_)


def _write_text(path: Path, text: str) -> None:
    fd = _attempt(path, lambda: os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
    try:
        _attempt(path, lambda: _put(fd, memoryview(text.encode()), 0))
        _attempt(path, lambda: os.fsync(fd))
    finally:
        os.close(fd)


def _rename(partial: Path, final: Path) -> Path:
    _attempt(final, lambda: partial.rename(final))
    return final


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _attempt(path: Path, act: Callable[[], T]) -> T:
    try:
        return act()
    except OSError as error:
        final = path.with_name(path.name.removesuffix(".partial"))
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise OutputError(
            f"{final} cannot be written",
            why=error.strerror or str(error),
            fix="make room, or write elsewhere; nothing was left behind" if full else "",
        ) from None
