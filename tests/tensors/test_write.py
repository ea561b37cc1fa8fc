"""Writing: the bytes that safetensors would write, in bounded memory, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lfm.core.errors import CorruptError, OutputError
from lfm.tensors.digest import digest_tensors
from lfm.tensors.files import open_tensors
from lfm.tensors.lazy import Computed, Whole
from lfm.tensors.safetensors_file import DTYPES, torch_dtype
from lfm.tensors.write import write_tensors

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8).filter(lambda n: n != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=3)


def left(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPES)), SHAPES), max_size=6), st.integers(1, 7))
def test_the_bytes_are_those_of_safetensors(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, tuple[str, list[int]]], chunk: int
) -> None:
    directory = tmp_path_factory.mktemp("written")
    tensors = {name: torch.ones(shape).to(torch_dtype(code)) for name, (code, shape) in kinds.items()}
    save_file(tensors, directory / "known", {"format": "pt"})
    write_tensors(directory, tensors, chunk=chunk)
    assert (directory / "model.safetensors").read_bytes() == (directory / "known").read_bytes()


def test_shards_are_named_indexed_and_filled_as_transformers_does(tmp_path: Path) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = {f"t{i}": torch.randn(n) for i, n in enumerate([3, 5, 1, 40, 2, 2])}
    known = split_torch_state_dict_into_shards(tensors, max_shard_size=40, filename_pattern="model{suffix}.safetensors")
    files = write_tensors(tmp_path, tensors, max_shard_bytes=40)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 53 * 4, "total_parameters": 53}
    assert index["weight_map"] == known.tensor_to_filename
    assert left(tmp_path) == sorted(path.name for path in files)
    found = open_tensors(tmp_path)
    assert all(torch.equal(found[name].read(), tensors[name]) for name in tensors)


def test_transformers_loads_shards(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import tiny

    source = tiny.causal(tmp_path / "source")
    out = tmp_path / "out"
    out.mkdir()
    stored = open_tensors(source)
    write_tensors(out, stored, max_shard_bytes=10_000)
    assert len(left(out)) > 3
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    module, known = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (out, source))
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), known.state_dict().values(), strict=True)
    )
    assert digest_tensors(open_tensors(out)) == digest_tensors(stored)


def test_dtype_casts_what_is_floating(tmp_path: Path) -> None:
    tensors = {
        "w": torch.randn(5),
        "ids": torch.arange(5),
        "whole": Whole((5,), torch.float32, lambda: torch.arange(5.0)),
    }
    write_tensors(tmp_path, tensors, dtype=torch.bfloat16)
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["w"], tensors["w"].bfloat16()) and torch.equal(found["ids"], tensors["ids"])
    assert torch.equal(found["whole"], torch.arange(5.0).bfloat16())


def test_views_and_parameters_are_written_as_they_look(tmp_path: Path) -> None:
    known = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path, {"t": known.T, "row": known[1], "p": torch.nn.Parameter(known), "every": known[:, ::2]})
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["t"], known.T) and torch.equal(found["row"], known[1]) and torch.equal(found["p"], known)
    assert torch.equal(found["every"], known[:, ::2])


def test_another_stem(tmp_path: Path) -> None:
    assert write_tensors(tmp_path, {"t": torch.ones(1)}, stem="adapter_model") == (
        tmp_path / "adapter_model.safetensors",
    )


def test_file_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        (path,) = write_tensors(tmp_path, {"t": torch.ones(1)})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_no_more_than_a_few_chunks_are_ever_asked_for(tmp_path: Path) -> None:
    asked, in_flight, most = [], 0, 0
    lock = threading.Lock()

    def part(start: int, stop: int) -> torch.Tensor:
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
            asked.append(stop - start)
        values = torch.arange(start, stop).float()
        with lock:
            in_flight -= 1
        return values

    write_tensors(tmp_path, {"t": Computed((100, 10), torch.float32, part)}, chunk=64, workers=2)
    assert max(asked) == 64 and sum(asked) == 1000 and most <= 2
    assert torch.equal(load_file(tmp_path / "model.safetensors")["t"], torch.arange(1000.0).reshape(100, 10))


def test_a_tensor_larger_than_memory_is_written(tmp_path: Path) -> None:
    """In a process whose heap may grow by 48 MB, a tensor of 128 MB is written."""
    code = """
import resource, sys, pathlib, torch
from lfm.tensors.files import open_tensors
from lfm.tensors.lazy import Computed, map_tensors
from lfm.tensors.write import write_tensors
torch.set_num_threads(1)
out = pathlib.Path(sys.argv[1])
source = {"t": Computed((1 << 25,), torch.float32, lambda a, b: torch.arange(a, b).float())}
write_tensors(out, {"warm": torch.ones(1 << 20)}, stem="warm", chunk=1 << 16, workers=2)
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + (48 << 20),) * 2)
write_tensors(out, map_tensors(["t"], lambda name, x: x * 2, [source]), workers=2)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    stored = open_tensors(tmp_path)["t"]
    assert stored.shape == (1 << 25,)
    assert stored.read_flat((1 << 24) - 2, 1 << 24).tolist() == [2.0 * ((1 << 24) - 2), 2.0 * ((1 << 24) - 1)]
    (tmp_path / "model.safetensors").unlink()


FULL: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "at once": lambda patch: patch.setattr(os, "posix_fallocate", _full),
    "while writing": lambda patch: patch.setattr(os, "pwrite", _full_later()),
    "at the end": lambda patch: patch.setattr(os, "fsync", _full),
}


def _full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_later() -> Callable[..., int]:
    real, calls = os.pwrite, iter(range(100))
    return lambda *a: real(*a) if next(calls) < 5 else _full()


@pytest.mark.parametrize("when", FULL)
@pytest.mark.parametrize("limit", [10**9, 40])
def test_a_full_disk_leaves_nothing(when: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    FULL[when](monkeypatch)
    with pytest.raises(OutputError, match=r"model.*\.safetensors cannot be written\. No space left on device"):
        write_tensors(tmp_path, {f"t{i}": torch.ones(10) for i in range(4)}, max_shard_bytes=limit, chunk=4)
    assert left(tmp_path) == ["config.json"]


def test_a_file_size_limit_is_met_before_the_work(tmp_path: Path) -> None:
    asked = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OutputError, match="File too large"):
            tensor = Computed((100_000,), torch.float32, lambda a, b: asked.append(a) or torch.zeros(b - a))
            write_tensors(tmp_path, {"t": tensor})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left(tmp_path) == [] and asked == []


def test_an_error_in_a_tensor_leaves_nothing(tmp_path: Path) -> None:
    def bad(start: int, stop: int) -> torch.Tensor:
        if start >= 8:
            raise CorruptError("t is corrupt")
        return torch.zeros(stop - start)

    with pytest.raises(CorruptError):
        write_tensors(tmp_path, {"t": Computed((20,), torch.float32, bad)}, chunk=2)
    assert left(tmp_path) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"t": torch.ones(1)})
    for limit in (10, 4):
        with pytest.raises(OutputError, match="exists already"):
            write_tensors(tmp_path, {"a": torch.zeros(1), "b": torch.zeros(1)}, max_shard_bytes=limit)
    assert load_file(tmp_path / "model.safetensors")["t"].item() == 1 and left(tmp_path) == ["model.safetensors"]
    with pytest.raises(OutputError, match="cannot be written"):
        write_tensors(tmp_path / "absent", {"t": torch.ones(1)})
