"""reuse.della_linear: changes of either sign are added up. How they are dropped is tested with reuse.della."""

from __future__ import annotations

from pathlib import Path

import torch

from case import Case
from lfm.methods.reuse import della_linear
from methods.reuse import test_della
from methods.reuse.merging import bare, merge, tensors


def case(here: Path) -> Case:
    return test_della.case(here)


def test_what_is_kept_is_added_whatever_its_sign(tmp_path: Path) -> None:
    start = bare(tmp_path / "base.safetensors", {"w": torch.zeros(3)})
    a = bare(tmp_path / "a.safetensors", {"w": torch.tensor([3.0, 1.0, 2.0])})
    b = bare(tmp_path / "b.safetensors", {"w": torch.tensor([-2.0, 3.0, -2.0])})
    found = tensors(merge(della_linear, tmp_path, {"base": [start], "models": [a, b]}, density=[1.0]))["w"]
    assert found.tolist() == [1.0, 4.0, 0.0]
