"""Input embeddings on the wire: safetensors, and torch.save read without unpickling."""

from __future__ import annotations

import base64
import io
import os
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from lfm.core.errors import DataError, LfmError, UnsafeError
from lfm.models.api.embeds import decode, encode

ROWS = torch.arange(12.0).reshape(3, 4) / 7


def saved(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def repacked(raw: bytes, name: str, content: bytes) -> bytes:
    """A torch.save archive with one member replaced."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, content if info.filename.endswith(name) else old.read(info))
    return out.getvalue()


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32))
def test_what_is_encoded_comes_back(t: int, d: int, seed: int) -> None:
    rows = torch.randn(t, d, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(decode(encode(rows)), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_torch_save_is_read_as_torch_reads_it(dtype: torch.dtype) -> None:
    """As vLLM's client sends it: base64 of torch.save of one tensor."""
    for rows in (
        ROWS,
        ROWS.T,
        ROWS[:, 1:3],
        ROWS[1:],
        ROWS[None],
        ROWS[:1].expand(5, 4),
        ROWS.clone().requires_grad_(),
    ):
        stored = rows.detach().to(dtype) if not rows.requires_grad else rows
        expected = torch.load(io.BytesIO(saved(stored)), weights_only=True).detach().float()
        assert torch.equal(decode(text(saved(stored))), expected.reshape(expected.shape[-2:]))


class Bomb:
    """What unpickling would set off."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_that_does_anything_is_refused_and_not_run(protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "was run"
    archive = repacked(saved(ROWS), "data.pkl", pickle.dumps(Bomb(mark), protocol))
    with pytest.raises(UnsafeError, match="safetensors"):
        decode(text(archive))
    assert not mark.exists()


@pytest.mark.parametrize(
    "value",
    [{"a": ROWS}, [ROWS], torch.nn.Parameter(ROWS), ROWS.long(), torch.tensor(["a" == "b"]), "text", ROWS.to_sparse()],
    ids=lambda v: type(v).__name__,
)
def test_anything_but_one_plain_tensor_is_refused(value: Any) -> None:
    with pytest.raises(UnsafeError):
        decode(text(saved(value)))


def test_a_tensor_larger_than_its_data_is_refused() -> None:
    with pytest.raises(DataError, match="larger than its data"):
        decode(text(repacked(saved(ROWS), "data/0", b"\0" * 8)))
    with pytest.raises(DataError, match="larger than its data"):
        decode(text(repacked(saved(ROWS), "data/0", b"")))


def test_an_archive_that_unpacks_to_too_much_is_refused() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02.")
        archive.writestr("a/data/0", b"\0" * (2**28 + 1))
    with pytest.raises(DataError, match="too large"):
        decode(text(out.getvalue()))


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ("%%%", "base64"),
        (text(b"hello"), "neither safetensors nor torch.save"),
        (text(save({"a": ROWS, "b": ROWS + 1})), "2 tensors"),
        (text(save({"a": ROWS.long()})), "int64"),
        (text(save({"a": ROWS[0].clone()})), "shape"),
        (text(save({"a": ROWS[:0].clone()})), "shape"),
        (text(save({"a": ROWS / 0})), "NaN"),
        (text(b"PK\x03\x04 and then nothing"), "damaged"),
    ],
)
def test_each_fault_is_named(given_: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        decode(given_)


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_is_an_error_or_other_numbers(place: int, value: int) -> None:
    raw = bytearray(saved(ROWS))
    raw[place % len(raw)] = value
    with suppress(LfmError):
        assert decode(text(bytes(raw))).dim() == 2


@given(st.binary(max_size=300))
def test_no_pickle_makes_it_fail_otherwise(pickled: bytes) -> None:
    with pytest.raises(LfmError):
        decode(text(repacked(saved(ROWS), "data.pkl", pickled)))
