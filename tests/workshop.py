"""A place to work in: a tiny model, and an installed package of two methods that is not ours."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny
from lfm.core import registry

SHIFT = '''
"""Add a constant to every weight of one tensor."""
import os
import pathlib
import time
from typing import Annotated
import lfm.core
from lfm.core import Cost, Meta, Method, Slot, Weights

class Config(lfm.core.Config, frozen=True):
    size: Annotated[float, Meta(description="of the shift")] = 0.5
    stop: Annotated[str, Meta(description="a file: interrupted after the first step unless it is there")] = ""
    meet: Annotated[str, Meta(description="MINE,OTHER: make the one file, wait for the other")] = ""
    die: Annotated[str, Meta(description="a file: the process dies unless it is there, and makes it")] = ""

def run(config, inputs, run):
    begun = (run.work / "steps" / "first.json").exists()
    first = run.step("first", lambda: os.getpid())
    if config.stop and not pathlib.Path(config.stop).exists() and config.size == 0.5:
        raise KeyboardInterrupt
    if config.die and not pathlib.Path(config.die).exists():
        pathlib.Path(config.die).touch()
        os._exit(9)
    if config.meet:
        mine, other = map(pathlib.Path, config.meet.split(","))
        mine.touch()
        while not other.exists():
            time.sleep(0.01)
    weights = inputs.model("model").ask(Weights)
    name, tensor = next((n, t) for n, t in weights.tensors().items() if t.dtype.is_floating_point)
    run.note(size=config.size, found=float(begun), began_in=float(first), process=float(os.getpid()))
    return weights.replace({name: tensor.read() + config.size})

METHOD = Method(paper="none", config=Config, models={"model": Slot((Weights,))}, run=run,
                cost=lambda config, sizes: Cost(disk=sizes.model("model").bytes, memory=sizes.model("model").bytes))
'''

NORM = '''
"""How long are the weights?"""
import lfm.core
from lfm.core import Cost, Method, Slot, Weights
from lfm.core.finding import table

class Config(lfm.core.Config, frozen=True):
    pass

def run(config, inputs, run):
    found = {n: t.read().double().norm().item() for n, t in inputs.model("model").ask(Weights).tensors().items()}
    rows = [{"tensor": n, "norm": v} for n, v in found.items()]
    return table("Norms", rows, metrics={"norm": sum(found.values())})

METHOD = Method(paper="none", config=Config, models={"model": Slot((Weights,))}, run=run, gives="finding",
                cost=lambda config, sizes: Cost())
'''


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a model, and an installed package of two methods that worker processes see too."""
    package = tmp_path / "site"
    info = package / "lfm_extra-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lfm-extra\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lfm.methods]\nedit.shift = lfm_shift\nprobe.norm = lfm_norm\n")
    (package / "lfm_shift.py").write_text(textwrap.dedent(SHIFT))
    (package / "lfm_norm.py").write_text(textwrap.dedent(NORM))
    here = tmp_path / "here"
    here.mkdir()
    tiny.causal(here / "model")
    monkeypatch.syspath_prepend(package)
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(here)
    registry.ids.cache_clear()
    yield here
    registry.ids.cache_clear()
