"""manifest.json tells of each tensor what its bytes say, and costs no second pass over them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lfm
import tiny
from lfm.cli import run
from lfm.core.errors import CorruptError, VerifyError
from lfm.fusing.statistics import BLOCK, Tally
from lfm.models import load
from lfm.record import read
from lfm.runs import manifest
from lfm.tensors.safetensors_file import StoredTensor

CODES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64}


def raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]


@given(st.data())
@settings(max_examples=60)
def test_statistics_are_those_of_the_numbers(data: st.DataObject) -> None:
    code, other = (data.draw(st.sampled_from(list(CODES))) for _ in range(2))
    count = data.draw(st.integers(1, 3 * BLOCK))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x, base = ((9 * torch.randn(count, generator=random)).to(CODES[c]) for c in (code, other))
    x[data.draw(st.lists(st.integers(0, count - 1), max_size=5))] = 0
    odd = data.draw(st.lists(st.integers(0, count - 1), max_size=3, unique=True)) if code != "I64" else []
    for place, value in zip(odd, (torch.nan, torch.inf, -torch.inf)):
        x[place] = value
    cut = data.draw(st.integers(0, count))
    tally = Tally(code, other)
    for part in (slice(0, cut), slice(cut, count)):
        tally.add(raw(x[part]), raw(base[part]))
    found, wide = tally.statistics(), x.double()
    finite = wide[wide.isfinite()]
    assert found.nonfinite == len(odd)
    if not len(finite):
        assert found[:5] == (None,) * 5
        return
    assert (found.min, found.max) == (finite.min(), finite.max())
    assert found.zeros == (wide == 0).sum() / count
    assert found.norm == pytest.approx(float(finite.norm()), rel=1e-12)
    assert found.mean == pytest.approx(float(finite.mean()), rel=1e-9, abs=1e-9)
    assert found.change == pytest.approx(float((wide - base.double())[wide.isfinite()].norm()), rel=1e-12)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        tiny.causal(tmp_path / name, seed=seed)
    return tmp_path


def told(out: str) -> dict[str, manifest.Entry]:
    done = read(Path(out))
    assert done.manifest == manifest.MANIFEST
    found = manifest.read(Path(out))
    assert found.digest == done.output.digest == lfm.load(out).digest
    return {entry.name: entry for entry in found.tensors}


def test_a_method_with_a_base_and_one_without(here: Path) -> None:
    models = {"base": "base", "models": ["a", "b"]}
    lfm.run("reuse.task_arithmetic", models, out="changed")
    lfm.run("reuse.linear", {"models": ["a", "b"]}, out="mean")
    start = load_file("base/model.safetensors")
    for out in ("changed", "mean"):
        entries, made = told(out), load_file(f"{out}/model.safetensors")
        assert entries.keys() == made.keys()
        for name, tensor in made.items():
            entry = entries[name]
            assert entry.blake3 == blake3(raw(tensor)).hexdigest()
            assert (entry.dtype, entry.shape) == ("float32", tuple(tensor.shape))
            assert entry.norm == pytest.approx(float(tensor.double().norm()), rel=1e-12)
            change = float((tensor.double() - start[name].double()).norm())
            assert entry.change == (pytest.approx(change, rel=1e-12) if out == "changed" else None)


def test_a_recipe_of_slices_counts_each_change_from_the_layer_that_it_began_as(here: Path) -> None:
    part = "  - sources: [{{model: base, layer_range: [{0}, {1}]}}, {{model: a, layer_range: [{0}, {1}]}}]\n"
    recipe = "merge_method: task_arithmetic\nbase_model: base\nparameters: {weight: 1}\nslices:\n"
    (here / "r.yml").write_text(recipe + part.format(1, 2) + part.format(0, 1))
    assert run(["merge", "r.yml", "out"]) == 0
    start, made = load_file("base/model.safetensors"), load_file("out/model.safetensors")
    name = "model.layers.{}.mlp.up_proj.weight"
    for layer in (0, 1):
        change = float((made[name.format(layer)].double() - start[name.format(1 - layer)].double()).norm())
        assert told("out")[name.format(layer)].change == pytest.approx(change, rel=1e-12)


def test_what_is_not_finite_is_counted(here: Path) -> None:
    tensors = load_file("b/model.safetensors")
    tensors["model.norm.weight"][:3] = torch.nan
    save_file(tensors, "b/model.safetensors", {"format": "pt"})
    lfm.run("reuse.linear", {"models": ["a", "b"]}, out="out", allow_nonfinite=True)
    counts = {name: entry.nonfinite for name, entry in told("out").items() if entry.nonfinite}
    assert counts == {"model.norm.weight": 3}


def test_the_manifest_and_the_digest_need_no_further_pass(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    plain = StoredTensor.read_into

    def counted(self: StoredTensor, buffer: memoryview, offset: int = 0) -> None:
        opened.append(str(self.file))
        plain(self, buffer, offset)

    monkeypatch.setattr(StoredTensor, "read_into", counted)
    done = lfm.run("reuse.linear", {"models": ["a", "b"]}, out="out")
    assert opened and not any(".out.lfm" in file for file in opened)
    listed = manifest.read(Path("out"))
    tensors = load_file("out/model.safetensors")
    assert {e.name: e.blake3 for e in listed.tensors} == {
        name: blake3(raw(tensor)).hexdigest() for name, tensor in tensors.items()
    }
    assert listed.digest == done.output.digest == load(Path("out")).digest


def test_a_bit_that_the_disk_changes_is_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lfm.tensors import write

    def worn(fd: int, data: memoryview, at: int) -> None:
        told = bytearray(data)
        if at > 5000 and len(told) > 100:
            told[57] ^= 4
        os.pwrite(fd, told, at)

    monkeypatch.setattr(write, "_put", worn)
    with pytest.raises(VerifyError, match="what was saved is not what was made"):
        lfm.run("reuse.linear", {"models": ["a", "b"]}, out="out")
    assert not Path("out").exists()


def test_a_model_that_was_trained_has_none(here: Path) -> None:
    (here / "train.jsonl").write_text('{"prompt": "Q: two A:", "completion": " four"}\n')
    lfm.run("tune.lora", {"model": "a"}, {"train": "train.jsonl"}, out="out", set={"steps": 1})
    assert read(Path("out")).manifest == ""
    with pytest.raises(CorruptError, match="is not a manifest"):
        manifest.read(Path("out"))
