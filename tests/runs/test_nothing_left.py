"""A run that fails leaves what another could resume, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lfm
import tiny
from lfm.core.errors import CorruptError, DataError, EndpointError, LfmError
from lfm.runs import directory


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def spoil(model: Path, name: str) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[7] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def test_bad_input_found_after_a_kept_step_leaves_nothing(tmp_path: Path) -> None:
    """TIES keeps its thresholds as a step; the tensor that is not a number is met after some of them."""
    for seed, name in enumerate(("base", "a", "b")):
        tiny.causal(tmp_path / name, seed=seed)
    spoil(tmp_path / "b", "model.norm.weight")
    before = listing(tmp_path)
    models = {"base": tmp_path / "base", "models": [tmp_path / "a", tmp_path / "b"]}
    for settings in ({"density": 0.5}, {"density": 0.6}):
        with pytest.raises(CorruptError, match=r"b.model.safetensors: 'model.norm.weight' holds a NaN"):
            lfm.run("reuse.ties", models, out=tmp_path / "runs" / "out", set=settings)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("error", "paid", "kept"),
    [(DataError("x"), False, False), (DataError("x"), True, True), (EndpointError("x"), False, True),
     (KeyboardInterrupt(), False, True)],
)  # fmt: skip
def test_what_could_be_resumed_is_kept(tmp_path: Path, error: BaseException, paid: bool, kept: bool) -> None:
    with pytest.raises(type(error)), directory.claim(tmp_path / "deep" / "out", "key") as work:
        (work / "steps").mkdir()
        (work / "steps" / "one.json").write_text("1")
        if paid:
            (work / directory.LEDGER).touch()
        raise error
    assert listing(tmp_path) == (["deep"] if kept else [])


def test_scratch_files_are_not_resumed_for(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), directory.claim(tmp_path / "out", "key") as work:
        (work / directory.SCRATCH).mkdir()
        (work / directory.SCRATCH / "tokenizer.json").touch()
        raise KeyboardInterrupt
    assert listing(tmp_path) == []


def test_directories_made_on_the_way_stay_if_somebody_else_uses_them(tmp_path: Path) -> None:
    with pytest.raises(LfmError), directory.claim(tmp_path / "a" / "b" / "out", "key"):
        (tmp_path / "a" / "mine").touch()
        raise DataError("x")
    assert listing(tmp_path / "a") == ["mine"]
