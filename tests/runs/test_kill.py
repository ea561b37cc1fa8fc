"""A run can be killed at any moment: resumed, it gives the same bytes as one left alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from lfm.data import files
from lfm.data.records import Completion

CHILD = Path(__file__).parent / "killed.py"


def child(here: Path, id: str, data: dict[str, str], settings: dict[str, Any], out: str) -> subprocess.Popen[str]:
    models = json.dumps({"model": [str(here / "model")]})
    words = [id, models, json.dumps(data), json.dumps(settings), str(here / out)]
    environment = os.environ | {"LFM_HOME": str(here / "home"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, CHILD, *words], stdout=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> tuple[str, int]:
    """The digest, and how many ticks there were."""
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    lines = out.splitlines()
    return next(line.split()[1] for line in lines if line.startswith("digest")), len(lines) - 1


def kill_at(process: subprocess.Popen[str], tick: int) -> None:
    """SIGKILL after so many ticks."""
    assert process.stdout
    for _ in range(tick):
        assert process.stdout.readline().startswith("tick"), "it ended before it was killed"
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("id", "settings"),
    [("edit.nudge", {"steps": 40}), ("tune.lora", {"steps": 12, "batch_size": 2, "checkpoint_every": 0})],
)
def test_killed_at_random_points_and_resumed_it_makes_the_same_model(
    id: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    tiny.causal(tmp_path / "model")
    records = [Completion(prompt=f"Q: {word} A:", completion=" four") for word in ("two", "three", "cats", "dogs")]
    files.write(records, tmp_path / "train.jsonl")
    data = {"train": str(tmp_path / "train.jsonl")} if id == "tune.lora" else {}
    expected, ticks = finish(child(tmp_path, id, data, settings, "alone"))
    seed = random.randrange(10**6)
    print("kills drawn with seed", seed)  # shown if it fails
    draw = random.Random(seed)
    for _ in range(2):
        kill_at(child(tmp_path, id, data, settings, "killed"), draw.randint(1, max(1, ticks // 3)))
        assert not (tmp_path / "killed").exists()
    digest, _ = finish(child(tmp_path, id, data, settings, "killed"))
    assert digest == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "home", "killed", "model", "train.jsonl"]
