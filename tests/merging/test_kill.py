"""A merge killed at any byte: nothing half-made can be loaded, and the same command makes the same model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from lfm.core.home import home
from lfm.runs.machine import matrix_rate
from lfm.tensors import compiled
from lfm.tensors.known import SETTLED
from lfm.tensors.write import SHARD

CHILD = Path(__file__).with_name("killed.py")
RECIPE = """
base_model: {here}/base
merge_method: ties
dtype: bfloat16
models:
  - {{model: {here}/a, parameters: {{weight: 1.0, density: 0.3}}}}
  - {{model: {here}/b, parameters: {{weight: 0.5, density: 0.5}}}}
"""


def kill(here: Path, words: list[str], points: int) -> list[dict[str, object]]:
    for seed, name in enumerate(("base", "a", "b")):
        tiny.causal(here / name, seed=seed)
    (here / "home").mkdir()
    matrix_rate()  # known, so that all runs do the same
    for kept, lies in (("compiled", compiled.home()), ("machines", home())):  # a ledger of its own
        (lies / kept).mkdir(parents=True, exist_ok=True)
        (here / "home" / kept).symlink_to(lies / kept)
    time.sleep(SETTLED)  # so that the first run keeps its inputs' digests, and all do the same
    environment = os.environ | {
        "LFM_HOME": str(here / "home"),
        "OMP_NUM_THREADS": "1",
        SHARD: "60000",
    }  # several shards
    done = subprocess.run(
        [sys.executable, CHILD, here, str(points), *words], env=environment, capture_output=True, text=True, timeout=880
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def hold(found: list[dict[str, object]], at_least: int) -> None:
    assert sum(each["code"] == -9 for each in found) >= at_least
    for each in found:
        assert not each["mixed"], each  # loadable, and not the whole result
        assert not each["out"], each  # there, and not loadable
        assert each["again"] == 0 and each["same"] and not each["left"], each


def by_recipe(here: Path) -> list[str]:
    (here / "recipe.yml").write_text(RECIPE.format(here=here))
    return ["merge", str(here / "recipe.yml"), str(here / "out")]


def by_method(here: Path) -> list[str]:
    roles = [f"base={here / 'base'}", f"models={here / 'a'}", f"models={here / 'b'}"]
    return ["run", "reuse.ties", *roles, "--out", str(here / "out"), "--set", "scope=model"]


@pytest.mark.parametrize("words", [by_recipe, by_method])
def test_killed_anywhere_it_makes_the_same_model(tmp_path: Path, words: Callable[[Path], list[str]]) -> None:
    hold(kill(tmp_path, words(tmp_path), points=7), at_least=6)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("words", [by_recipe, by_method])
def test_killed_at_every_operation_and_many_bytes(tmp_path: Path, words: Callable[[Path], list[str]]) -> None:
    hold(kill(tmp_path, words(tmp_path), points=0), at_least=250)
