"""Computed tensors, digests and checks: chunks, threads and shards never show in the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lfm.core.errors import CorruptError
from lfm.core.interfaces import LazyTensor
from lfm.tensors.digest import digest_tensors
from lfm.tensors.files import open_tensors
from lfm.tensors.finite import find_nonfinite
from lfm.tensors.lazy import Computed, Held, Whole, chunks, is_chunked, map_tensors, parts, spans
from lfm.tensors.parallel import each


@given(st.integers(0, 50), st.integers(1, 60))
def test_spans_cover_everything_once(size: int, chunk: int) -> None:
    assert [i for start, stop in spans(size, chunk) for i in range(start, stop)] == list(range(size))
    assert all(stop - start <= chunk for start, stop in spans(size, chunk))


def test_mapping_is_elementwise_in_fp32_and_stored_like_the_first(tmp_path: Path) -> None:
    a, b = torch.randn(5, 7).bfloat16(), torch.randn(5, 7)
    save_file({"t": a}, tmp_path / "a.safetensors")
    sources: list[dict[str, LazyTensor]] = [dict(open_tensors(tmp_path / "a.safetensors")), {"t": Held(b)}]
    seen = []

    def add(name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append((name, x.dtype, y.dtype))
        return x + y

    made = map_tensors(["t"], add, sources)["t"]
    assert seen == [] and made.shape == (5, 7) and made.dtype == torch.bfloat16
    assert torch.equal(made.read(), (a.float() + b).bfloat16())
    assert seen == [("t", torch.float32, torch.float32)]
    assert map_tensors(["t"], add, sources, like=sources[1])["t"].dtype == torch.float32


def test_mapping_a_tensor_that_can_only_be_read_whole_reads_it_once() -> None:
    reads = []
    whole = Whole((6,), torch.float64, lambda: reads.append(1) or torch.arange(6.0))
    made = map_tensors(["t"], lambda name, x: x * 2, [{"t": whole}])["t"]
    assert not is_chunked(made)
    assert [(start, values.tolist()) for start, values in chunks(made, 2)] == [(0, [0, 2, 4, 6, 8, 10])]
    assert made.read().dtype == torch.float64 and len(reads) == 2


@given(st.integers(1, 40))
def test_chunks_put_together_are_the_tensor(chunk: int) -> None:
    known = torch.randn(4, 9)
    for tensor in (Held(known), Computed((4, 9), torch.float32, lambda a, b: known.reshape(-1)[a:b])):
        assert torch.equal(torch.cat([values for _, values in chunks(tensor, chunk)]).reshape(4, 9), known)
    together = [read() for read in parts([Held(known), Held(known * 2)], chunk)]
    assert torch.equal(torch.cat([second for _, second in together]), known.reshape(-1) * 2)


def test_a_result_that_is_not_finite_names_what_spoiled_it(tmp_path: Path) -> None:
    save_file({"good": torch.ones(4), "bad": torch.tensor([1.0, float("nan")])}, tmp_path / "m.safetensors")
    stored = open_tensors(tmp_path / "m.safetensors")
    made = map_tensors(["good", "bad"], lambda name, x: x * 1e30, [stored])
    assert torch.equal(made["good"].read(), torch.full((4,), 1e30))
    with pytest.raises(CorruptError, match=r"m\.safetensors: 'bad' holds a NaN"):
        made["bad"].read()
    over = map_tensors(["t"], lambda name, x: x * 1e6, [{"t": Held(torch.ones(3, dtype=torch.float16))}])["t"]
    with pytest.raises(CorruptError, match=r"'t' leaves the range of torch\.float16"):
        over.read()


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", FLOATS)
def test_nonfinite_weights_are_found(dtype: torch.dtype) -> None:
    tensors = {name: torch.ones(300_000).to(dtype) for name in "cab"} | {"ids": torch.arange(3), "none": torch.empty(0)}
    assert find_nonfinite(tensors) is None
    tensors["c"][-1] = float("nan")
    assert find_nonfinite(tensors) == "c"
    if dtype != torch.float8_e4m3fn:  # which has no infinity
        tensors["b"][150_000] = float("-inf")
        assert find_nonfinite(tensors) == "b"


def test_a_digest_is_of_content_and_not_of_files(tmp_path: Path) -> None:
    from lfm.tensors.write import write_tensors

    tensors = {"a": torch.randn(700), "b": torch.randn(3, 5).bfloat16(), "c": torch.arange(4), "d": torch.empty(0, 2)}
    known = digest_tensors(tensors)
    for i, limit in enumerate((10**9, 1000, 1)):
        (tmp_path / str(i)).mkdir()
        write_tensors(tmp_path / str(i), dict(reversed(tensors.items())), max_shard_bytes=limit)
        assert digest_tensors(open_tensors(tmp_path / str(i)), workers=i + 1) == known
    lazies = {name: Whole(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}
    assert digest_tensors(lazies) == known


def test_a_digest_sees_every_difference() -> None:
    base = {"a": torch.zeros(6), "b": torch.zeros(2)}
    others = [
        {"a": torch.zeros(6), "c": torch.zeros(2)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(2)},
        {"a": torch.zeros(6), "b": torch.zeros(2, dtype=torch.int32)},
        {"a": torch.zeros(6), "b": torch.tensor([0.0, -0.0])},
        {"a": torch.zeros(6)},
        {"a": torch.zeros(2), "b": torch.zeros(6)},
    ]
    digests = [digest_tensors(tensors) for tensors in (base, *others)]
    assert len(set(digests)) == len(digests)


def test_a_digest_of_large_tensors_rests_on_all_their_bytes(tmp_path: Path) -> None:
    import hashlib
    import json

    tensor = torch.arange(1 << 20, dtype=torch.int32)  # four buffers
    save_file({"t": tensor}, tmp_path / "model.safetensors")
    line = json.dumps(["t", "I32", [1 << 20], blake3(tensor.numpy().tobytes()).hexdigest()])
    assert digest_tensors(open_tensors(tmp_path)) == hashlib.sha256(line.encode()).hexdigest()


@settings(deadline=None)
@given(st.lists(st.integers()), st.integers(1, 4))
def test_each_item_is_worked_on_once(items: list[int], workers: int) -> None:
    assert sorted(each(lambda i: i + 1, items, workers)) == sorted(i + 1 for i in items)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_error_ends_the_work(workers: int) -> None:
    done = []

    def work(i: int) -> None:
        if i == 5:
            raise CorruptError("five")
        done.append(i)

    with pytest.raises(CorruptError, match="five"):
        list(each(work, range(1000), workers))
    assert len(done) < 100
