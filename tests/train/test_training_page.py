"""The page about training shows code that runs and the defaults there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tiny
from lfm.core.config import fields
from lfm.data.files import write
from lfm.data.records import Text
from lfm.runs.run import LocalRun
from lfm.train import Fit

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.causal(tmp_path / "model")
    write([Text(text=line) for line in tiny.CORPUS], tmp_path / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names: dict[str, object] = {"run": LocalRun(0, tmp_path / "work")}
    exec(code[0], names)
    losses = names["losses"]
    assert isinstance(losses, tuple) and losses[-1] < losses[0]


def test_its_table_has_every_setting_with_its_default() -> None:
    told: dict[str, str] = {}
    for row in re.findall(r"^\| (`.*?`) \| (.*?) \|", PAGE, re.M):
        told |= zip(re.findall(r"`(\w+)`", row[0]), row[1].split(", "))
    settings = {field.name: field.default for field in fields(Fit)}
    assert told.keys() == settings.keys()
    for name, default in settings.items():
        assert told[name] == default if isinstance(default, str) else float(told[name]) == default, name
