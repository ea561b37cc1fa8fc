"""Reading .safetensors: what is read is what was stored, and a file that contradicts itself is named, not read."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lfm.core.errors import CorruptError, LfmError, ModelError, UnsafeError
from lfm.tensors.files import open_tensors, weight_files
from lfm.tensors.safetensors_file import DTYPES, read_header, torch_dtype


def raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def sharded(
    directory: Path, shards: dict[str, dict[str, torch.Tensor]], weight_map: dict[str, Any] | None = None
) -> Path:
    directory.mkdir(exist_ok=True)
    for file, tensors in shards.items():
        save_file(tensors, directory / file)
    index = weight_map if weight_map is not None else {name: file for file, held in shards.items() for name in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return directory


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_reads_as_safetensors_reads_it(code: str, tmp_path: Path) -> None:
    bytes_ = torch.arange(48, dtype=torch.uint8) % 2 if code == "BOOL" else torch.arange(48, dtype=torch.uint8)
    save_file({"t": bytes_.view(torch_dtype(code)).reshape(2, -1)}, tmp_path / "model.safetensors")
    stored, known = open_tensors(tmp_path)["t"], load_file(tmp_path / "model.safetensors")["t"]
    assert (stored.shape, stored.dtype) == (tuple(known.shape), known.dtype)
    assert torch.equal(stored.read().view(torch.uint8), known.view(torch.uint8))
    middle = stored.read_flat(1, stored.size - 1).view(torch.uint8)
    assert torch.equal(middle, known.reshape(-1)[1:-1].view(torch.uint8))


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    known = {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "rest": torch.ones(2, dtype=torch.bfloat16)}
    save_file(known, tmp_path / "model.safetensors")
    stored = open_tensors(tmp_path)
    assert stored.keys() == known.keys()
    assert all(torch.equal(stored[name].read(), known[name]) for name in known)


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    save_file({"t": torch.ones(3)}, tmp_path / "model.safetensors")
    stored = open_tensors(tmp_path)["t"]
    stored.read().zero_()
    assert torch.equal(stored.read(), torch.ones(3))


def test_shards_read_as_one(tmp_path: Path) -> None:
    a, b, c = torch.randn(2, 3), torch.randn(4), torch.randn(1)
    sharded(
        tmp_path, {"model-00001-of-00002.safetensors": {"a": a, "c": c}, "model-00002-of-00002.safetensors": {"b": b}}
    )
    stored = open_tensors(tmp_path)
    assert {name: t.read().tolist() for name, t in stored.items()} == {
        "a": a.tolist(),
        "b": b.tolist(),
        "c": c.tolist(),
    }
    assert [file.name for file in weight_files(tmp_path)] == [
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    save_file({"t": torch.ones(3)}, tmp_path / "model.safetensors")
    code = (
        "import sys, pathlib; from lfm.tensors.files import open_tensors;"
        "from lfm.tensors.digest import digest_tensors;"
        "found = open_tensors(pathlib.Path(sys.argv[1])); digest_tensors(found); assert found['t'].shape == (3,);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


LIES = {
    "an empty file": (lambda p: p.write_bytes(b""), "0 bytes, too few"),
    "a header longer than the file": (lambda p: raw(p, {}, length=1000), "claims 1000 bytes"),
    "a header beyond the format's limit": (lambda p: raw(p, {}, length=100_000_001), "claims 100000001 bytes"),
    "no JSON": (lambda p: raw(p, b"{'t': 1}"), "not JSON"),
    "bytes that are no text": (lambda p: raw(p, b'{"\xff": 1}'), "not JSON"),
    "JSON nested without end": (lambda p: raw(p, b'{"t":' + b"[" * 100_000), "not JSON"),
    "a number of 5000 digits": (lambda p: raw(p, b'{"t":' + b"9" * 5000 + b"}"), "not JSON"),
    "NaN, which JSON has not": (lambda p: raw(p, b'{"t": NaN}'), "not JSON"),
    "a list": (lambda p: raw(p, []), "not a JSON object"),
    "a name twice": (lambda p: raw(p, b'{"t":' + json.dumps(entry()).encode() + b',"t":{}}', bytes(8)), "'t' twice"),
    "a key twice": (lambda p: raw(p, b'{"t":{"dtype":"F32","dtype":"F16"}}'), "'dtype' twice"),
    "metadata that is no map": (lambda p: raw(p, {"__metadata__": 3}), "__metadata__"),
    "metadata that is no text": (lambda p: raw(p, {"__metadata__": {"a": 3}}), "__metadata__"),
    "an entry without shape": (
        lambda p: raw(p, {"t": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
        "'t' must have",
    ),
    "an entry that is no map": (lambda p: raw(p, {"t": 3}), "'t' must have"),
    "an unknown dtype": (lambda p: raw(p, {"t": entry(dtype="F33")}, bytes(8)), "'t' has unknown dtype 'F33'"),
    "a dtype that is no text": (lambda p: raw(p, {"t": entry(dtype=[1])}, bytes(8)), "'t' has unknown dtype"),
    "a negative shape": (lambda p: raw(p, {"t": entry([-1, -2])}, bytes(8)), "'t' has shape [-1, -2]"),
    "a fractional shape": (lambda p: raw(p, {"t": entry([2.0])}, bytes(8)), "'t' has shape [2.0]"),
    "a boolean shape": (lambda p: raw(p, {"t": entry([True, 2])}, bytes(8)), "'t' has shape [True, 2]"),
    "a shape that overflows": (lambda p: raw(p, {"t": entry([2**32, 2**32])}, bytes(8)), "'t' has 8 bytes"),
    "three offsets": (lambda p: raw(p, {"t": entry(offsets=[0, 4, 8])}, bytes(8)), "'t' has data_offsets"),
    "negative offsets": (lambda p: raw(p, {"t": entry(offsets=[-8, 0])}, bytes(8)), "'t' has data_offsets"),
    "offsets backwards": (lambda p: raw(p, {"t": entry(offsets=[8, 0])}, bytes(8)), "'t' has data_offsets"),
    "offsets beyond the file": (lambda p: raw(p, {"t": entry([4], [0, 16])}, bytes(8)), "'t' ends at byte"),
    "fewer bytes than the shape": (lambda p: raw(p, {"t": entry([3])}, bytes(8)), "shape [3] of F32 takes 12"),
    "overlap": (lambda p: raw(p, {"t": entry(), "u": entry(offsets=[4, 12])}, bytes(12)), "'u' overlaps 't'"),
    "the same bytes twice": (lambda p: raw(p, {"t": entry(), "u": entry()}, bytes(8)), "overlaps"),
    "a gap": (lambda p: raw(p, {"t": entry(), "u": entry(offsets=[12, 20])}, bytes(20)), "4 bytes before 'u'"),
    "a gap at the start": (lambda p: raw(p, {"t": entry(offsets=[4, 12])}, bytes(12)), "4 bytes before 't'"),
    "bytes after the last": (lambda p: raw(p, {"t": entry()}, bytes(11)), "last 3 bytes"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_contradicts_itself_is_named(lie: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    make, says = LIES[lie]
    make(path)
    with pytest.raises(CorruptError) as error:
        open_tensors(tmp_path)
    assert str(path) in str(error.value) and says in str(error.value)


def test_a_truncated_file_is_named_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptError, match=r"model\.safetensors"):
            open_tensors(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(data=st.data())
def test_no_changed_byte_is_met_by_anything_but_a_clear_error(data: st.DataObject, tmp_path: Path) -> None:
    """Whatever bytes a header holds: it is read as safetensors reads it, or refused by an error of ours."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.int16)}, path, {"format": "pt"})
    bytes_ = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        bytes_[data.draw(st.integers(0, len(bytes_) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes_)
    try:
        ours = {name: tensor.read() for name, tensor in open_tensors(path).items()}
    except LfmError:
        return
    try:
        known = load_file(path)
    except SafetensorError as error:
        raise AssertionError(f"we read what safetensors refuses: {error}") from None
    assert ours.keys() == known.keys()
    assert all(torch.equal(ours[n].contiguous().view(torch.uint8), known[n].view(torch.uint8)) for n in ours)


def test_a_file_that_changes_after_its_header_was_read_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"t": torch.ones(3)}, path)
    stored = open_tensors(tmp_path)["t"]
    save_file({"u": torch.zeros(5)}, path)
    with pytest.raises(CorruptError, match="changed while"):
        stored.read()
    path.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        stored.read()


def test_an_index_that_lies(tmp_path: Path) -> None:
    t, u = {"t": torch.ones(2)}, {"u": torch.ones(2)}
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    cases: list[tuple[dict[str, dict[str, torch.Tensor]], Any, str]] = [
        ({one: t}, {"t": one, "u": two}, f"{two}, which is missing"),
        ({one: t, two: u}, {"t": one, "u": two, "v": two}, "does not hold 'v'"),
        ({one: t, two: u}, {"t": one}, ""),
        ({one: t | u, two: u}, {"t": one, "u": two}, "holds 'u'"),
        ({one: t | u}, {"t": one}, "holds 'u'"),
        ({one: t}, {"t": "../other.safetensors"}, "beside the index"),
        ({one: t}, {"t": "/etc/passwd"}, "beside the index"),
        ({one: t}, {"t": 3}, "no weight_map"),
    ]
    for i, (shards, weight_map, says) in enumerate(cases):
        directory = sharded(tmp_path / str(i), shards, weight_map)
        if not says:  # a shard that no tensor is said to be in is not part of the model
            assert open_tensors(directory).keys() == {"t"}
            continue
        with pytest.raises(CorruptError) as error:
            open_tensors(directory)
        assert "index.json" in str(error.value) and says in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {"t": "a", "t": "b"}}', '{"a": "\ud800"}']
)
def test_an_index_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CorruptError, match=r"index\.json"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickled_weights_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"never read")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UnsafeError, match="is pickled"):
            open_tensors(path)


def test_the_refusal_says_how_to_convert_and_that_works(tmp_path: Path) -> None:
    known = {"t": torch.randn(3), "u": torch.arange(4)}
    torch.save(known, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeError) as error:
        open_tensors(tmp_path)
    command = error.value.fix.split("python -c ", 1)[1]
    subprocess.run(f"{sys.executable} -c {command}", shell=True, check=True)
    found = open_tensors(tmp_path)
    assert all(torch.equal(found[n].read(), known[n]) for n in known)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        open_tensors(tmp_path / "absent")
    with pytest.raises(ModelError, match="holds no weights"):
        open_tensors(tmp_path)
    save_file({"t": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"it holds adapter_model\.safetensors"):
        open_tensors(tmp_path)
    assert open_tensors(tmp_path / "adapter_model.safetensors").keys() == {"t"}
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match=r"not a \.safetensors file"):
        open_tensors(tmp_path / "notes.txt")


def test_two_models_in_one_directory_are_not_told_apart_silently(tmp_path: Path) -> None:
    sharded(tmp_path, {"model-00001-of-00001.safetensors": {"t": torch.ones(1)}})
    save_file({"t": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="holds both"):
        open_tensors(tmp_path)
    assert open_tensors(tmp_path / "model.safetensors")["t"].read().item() == 0
    assert open_tensors(tmp_path / "model.safetensors.index.json")["t"].read().item() == 1


def test_metadata_is_kept(tmp_path: Path) -> None:
    save_file({"t": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt", "note": "é"})
    assert read_header(tmp_path / "model.safetensors").metadata == {"format": "pt", "note": "é"}
