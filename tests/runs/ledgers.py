"""Ledgers of patches that no editor made: changes of rank one, each by its number."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from lfm.core import Weights
from lfm.core.interfaces import LowRank
from lfm.models import load
from lfm.runs import committing, patches

MODULES = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")


def change(base: Path, seed: int) -> dict[str, LowRank]:
    random = torch.Generator().manual_seed(seed)
    tensors = load(base).ask(Weights).tensors()
    found = {}
    for name in MODULES[seed % 2 :]:
        out, into = tensors[f"{name}.weight"].shape
        found[name] = LowRank(torch.randn(out, 1, generator=random) / 9, torch.randn(1, into, generator=random) / 9)
    return found


def patch(number: int) -> patches.Patch:
    return patches.Patch(number=number, method="by.hand", seed=0, config={}, edits=(), measured={}, made="now")


def grown(directory: Path, base: Path, count: int) -> None:
    ledger = patches.Ledger(base=str(base), base_digest=load(base).digest)
    directory.mkdir()
    for number in range(1, count + 1):
        ledger = msgspec.structs.replace(ledger, patches=(*ledger.patches, patch(number)))
        ledger = committing.put(directory, ledger, change(base, number))
