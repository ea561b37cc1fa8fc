"""What lies on disks: shards, lies, formats, vocabularies, space, modes. Handled, or one clear error and no trace."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from lfm.cli import run
from lfm.models import load
from lfm.tensors.write import write_tensors

WAYS = {
    "run": ["run", "reuse.linear", "models=a", "models=b", "--out", "out"],
    "merge": ["merge", "mean.yml", "out"],
}
MEAN = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: ./a}, {model: ./b}]\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b")):
        tiny.causal(tmp_path / name, seed=seed)
    (tmp_path / "mean.yml").write_text(MEAN)
    return tmp_path


def tensors(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def store(model: Path, given: dict[str, torch.Tensor]) -> None:
    save_file(given, model / "model.safetensors", {"format": "pt"})


def shard(model: Path) -> list[str]:
    given = tensors(model)
    (model / "model.safetensors").unlink()
    return [file.name for file in write_tensors(model, given, max_shard_bytes=50_000)]


@pytest.mark.parametrize("way", WAYS)
def test_inputs_are_cut_into_files_as_they_like(here: Path, way: str) -> None:
    whole, mean = load(here / "b").digest, {n: (t + tensors(here / "b")[n]) / 2 for n, t in tensors(here / "a").items()}
    assert len(shard(here / "b")) > 3
    assert load(here / "b").digest == whole
    assert run(WAYS[way]) == 0
    for name, tensor in tensors(here / "out").items():
        torch.testing.assert_close(tensor, mean[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_formats_may_differ_and_the_result_has_the_firsts(here: Path, way: str, first: torch.dtype) -> None:
    a, b = tensors(here / "a"), tensors(here / "b")
    a, b = {n: t.to(first) for n, t in a.items()}, {n: t.to(torch.float16) for n, t in b.items()}
    store(here / "a", a)
    store(here / "b", b)
    assert run(WAYS[way]) == 0
    for name, tensor in tensors(here / "out").items():
        assert torch.equal(tensor, ((a[name].double() + b[name].double()) / 2).to(first))


def lost(model: Path) -> str:
    name = shard(model)[1]
    (model / name).unlink()
    return f"it names {name}, which is missing"


def lying(model: Path) -> str:
    first, second = shard(model)[:2]
    index = model / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    name = next(n for n, file in told["weight_map"].items() if file == first)
    told["weight_map"][name] = second
    index.write_text(json.dumps(told))
    return f"{second} does not hold '{name}'"


def unindexed(model: Path) -> str:
    shard(model)
    (model / "model.safetensors.index.json").unlink()
    return "its index is missing"


def cut(model: Path) -> str:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return "truncated"


def short(model: Path) -> str:
    """A vocabulary of fewer tokens."""
    given = tensors(model)
    config = json.loads((model / "config.json").read_text())
    rows = config["vocab_size"]
    for name, tensor in given.items():
        if tensor.shape[0] == rows:
            given[name] = tensor[:-3].clone()
    store(model, given)
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": rows - 3}))
    return ""


def lacking(model: Path) -> str:
    given = tensors(model)
    name = "model.layers.1.mlp.up_proj.weight"
    del given[name]
    store(model, given)
    return name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spoil", [lost, lying, unindexed, cut, short, lacking])
def test_one_clear_error_and_nothing_left_behind(
    here: Path, way: str, spoil: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    told = spoil(here / "b")
    before = sorted(here.rglob("*"))
    capsys.readouterr()
    assert run(WAYS[way]) == 2
    said = capsys.readouterr().err
    assert sum(line.startswith("error ") for line in said.splitlines()) == 1 and "Traceback" not in said
    assert "".join(told.split()) in "".join(said.split())  # the screen breaks lines anywhere
    if spoil is short:
        assert ("tokenizer_source" if way == "merge" else "vocabularies") in said
    assert sorted(here.rglob("*")) == before


SIZES = {
    "run": (WAYS["run"], 1.0),
    "merge": (WAYS["merge"], 1.0),
    "wider": (["merge", "wider.yml", "out"], 2.0),
    "deeper": (["merge", "deeper.yml", "out"], None),
}


@pytest.mark.parametrize("case", SIZES)
def test_the_disk_is_looked_at_before_anything_is_made(
    here: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One byte too few, and just enough: what a merge takes is known by headers, whatever the recipe makes of them."""
    for name in ("a", "b"):
        store(here / name, {n: t.bfloat16() for n, t in tensors(here / name).items()})
    (here / "wider.yml").write_text(MEAN + "dtype: float32\n")
    part = "  - sources: [{model: ./a, layer_range: [0, 2]}, {model: ./b, layer_range: [0, 2]}]\n"
    (here / "deeper.yml").write_text("merge_method: linear\nparameters: {weight: 1}\nslices:\n" + part * 4)
    words, times = SIZES[case]
    given = tensors(here / "a")
    stored = sum(t.nbytes for t in given.values())
    layers = sum(t.nbytes for n, t in given.items() if ".layers." in n)
    takes = int(stored * times) if times else stored + 3 * layers
    before = sorted(here.rglob("*"))
    usage = shutil.disk_usage(here)
    for free in (takes - 1, takes):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _, free=free: SimpleNamespace(**usage._asdict() | {"free": free})
        )
        code = run(words)
        said = " ".join(capsys.readouterr().err.split())
        if free < takes:
            assert code == 2 and "would not fit" in said and "free some space" in said
            assert sorted(here.rglob("*")) == before
    assert code == 0
    assert sum(t.nbytes for t in tensors(here / "out").values()) == takes
    transformers.AutoModelForCausalLM.from_pretrained(here / "out")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_modes_follow_the_umask(here: Path, way: str, mask: int) -> None:
    (here / "a" / "tokenizer.json").chmod(0o666)  # a copy has modes of its own
    before = os.umask(mask)
    try:
        assert run(WAYS[way]) == 0
    finally:
        os.umask(before)
    for path in [here / "out", *(here / "out").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path
