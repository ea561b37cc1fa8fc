"""--max-memory is a promise: what cannot keep to it does not start, and what starts keeps to it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import lfm
import tiny
from lfm import runs
from lfm.cli import run
from lfm.cli.orders import size
from lfm.core.errors import ConfigError
from lfm.record import read
from lfm.tensors import parallel


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b")):
        tiny.causal(tmp_path / name, seed=seed)
    Path("mean.yml").write_text("merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: ./a}, {model: ./b}]\n")
    return tmp_path


WAYS = {
    "run": ["run", "reuse.linear", "models=a", "models=b", "--out", "out"],
    "merge": ["merge", "mean.yml", "out"],
}


@pytest.mark.parametrize("way", WAYS)
def test_what_needs_more_is_refused_before_it_starts(here: Path, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(here.iterdir())
    assert run([*WAYS[way], "--max-memory", "100MB"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"needs at least \d+ MB", said) and "100 MB may be used" in said
    assert sorted(here.iterdir()) == before
    assert run([*WAYS[way], "--max-memory", "200MB"]) == 0
    assert "--max-memory=200000000B" in read(here / "out").command


def test_the_plan_says_so_too(here: Path) -> None:
    ask = ["plan", "reuse.linear", "models=a", "models=b"]
    assert run([*ask, "--max-memory", "0.1GB"]) == 6
    assert run([*ask, "--max-memory", "200MB"]) == 0
    assert not lfm.plan("reuse.linear", {"models": ["a", "b"]}, memory=10**8).fits


def test_fewer_threads_where_that_makes_it_fit_and_the_same_model(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    seen: list[int] = []
    ways = {"models": [here / "a", here / "b"]}
    order = runs.Order(id="reuse.linear", models=ways, out=here / "limited", memory=220_000_000)
    prepared = runs.prepare(order)
    plan = runs.plan(prepared)
    assert plan.fits and plan.memory <= 220_000_000
    assert 1 < plan.threads < 64
    with parallel.at_most(plan.threads + 1):
        assert prepared.listed.method.cost(prepared.config, sizes(prepared)).memory > 220_000_000 - 60_000_000
    done = runs.execute(order, show=lambda *_: seen.append(parallel.threads()))
    assert set(seen[1:]) == {plan.threads}
    assert done.output.digest == lfm.run("reuse.linear", ways, out=here / "free").output.digest


def sizes(prepared: runs.Prepared):
    from lfm.core import Sizes

    return Sizes({role: tuple(m.facts for m in given) for role, given in prepared.inputs.models.items()}, {})


def test_what_is_measured_loads_torch_and_a_module(here: Path) -> None:
    (here / "text.jsonl").write_text('{"kind": "text", "text": "the cat sat"}\n')
    with pytest.raises(ConfigError, match="cannot keep to --max-memory"):
        lfm.run("reuse.linear", {"models": ["a", "b"]}, out="out", evals=["text.jsonl"], memory=250_000_000)


def test_a_training_is_not_told_to_take_shorter_records_where_torch_alone_takes_more(here: Path) -> None:
    (here / "text.jsonl").write_text('{"kind": "text", "text": "the cat sat"}\n')
    with pytest.raises(ConfigError, match="Python and its libraries alone take 315 MB"):
        lfm.run("tune.full", {"model": "a"}, data={"train": "text.jsonl"}, out="out", memory=250_000_000)


@pytest.mark.parametrize(
    ("text", "bytes_"), [("800MB", 8 * 10**8), ("1.5 GB", 15 * 10**8), ("2GiB", 2**31), ("4096", 4096), ("1kb", 1000)]
)
def test_sizes(text: str, bytes_: int) -> None:
    assert size(text) == bytes_


@pytest.mark.parametrize("text", ["lots", "-1GB", "1XB", "1iB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        size(text)


def large(path: Path, seed: int, count: int = 16) -> Path:
    """A bf16 model of `count` tensors of 8 MB and one of 16 times that: the same numbers over and over."""
    path.mkdir()
    block = (np.random.default_rng(seed).standard_normal(1 << 20).astype(np.float32).view(np.uint32) >> 16).astype(
        "<u2"
    )
    shapes = {"table": (count * 4096, 1024), **{f"layers.{i}.w": (4096, 1024) for i in range(count)}}
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (at, at + 2 * shape[0] * shape[1])}
        at = header[name]["data_offsets"][1]
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(at // block.nbytes):
            file.write(block.tobytes())
    (path / "config.json").write_text("{}")
    return path


def anonymous(words: list[str], environment: dict[str, str]) -> int:
    """The most anonymous memory that the command had, in bytes, looked at every few milliseconds."""
    code = "import sys; from lfm.cli import run; sys.exit(run(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *words], env=environment, stderr=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        most = max(most, int(found[1]) * 1024 if found else 0)
        time.sleep(0.004)
    assert process.returncode == 0
    return most


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_merge_of_400_megabytes_keeps_its_promise(tmp_path: Path) -> None:
    """Two models of 268 MB in, half of each a single tensor, one out."""
    models = [f"models={large(tmp_path / name, i)}" for i, name in enumerate("ab")]
    promise = 200_000_000
    words = ["run", "reuse.linear", *models, "--out", str(tmp_path / "out"), "--max-memory", f"{promise}B"]
    most = anonymous(words, os.environ | {"OMP_NUM_THREADS": "1"})
    assert 20_000_000 < most < promise
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 268_000_000
