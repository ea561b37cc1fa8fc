"""A record without words is found before a weight is read, whichever method would have learned from it."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from lfm import runs
from lfm.core.errors import DataError


@pytest.mark.parametrize(
    "id", ["on_policy", "cross_tokenizer", "response", "feature", "relation", "multi_teacher", "quantised"]
)
@pytest.mark.parametrize(
    "line, field", [('{"text": " \\n"}', "text"), ('{"prompt": "a", "completion": ""}', "completion")]
)
def test_the_blank_record_is_named_by_file_and_line(id: str, line: str, field: str, tmp_path: Path) -> None:
    for place in ("big", "small"):
        tiny.causal(tmp_path / place)
    whole = '{"text": "the cat"}' if field == "text" else '{"prompt": "a", "completion": " b"}'
    (tmp_path / "train.jsonl").write_text(f"{whole}\n{line}\n")
    second = "model" if id == "quantised" else "student"
    teachers = [tmp_path / "big"] * (1 + (id == "multi_teacher"))
    models = {"teacher": teachers, second: [tmp_path / "small"]}
    order = runs.Order(f"distill.{id}", models, {"train": tmp_path / "train.jsonl"}, out=tmp_path / "out")
    with pytest.raises(DataError, match=rf"train\.jsonl:2: '{field}' is blank"):
        runs.execute(order)
