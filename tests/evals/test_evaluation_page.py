"""The table of metrics on the page about evaluation is the table of metrics."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

import tiny
from lfm import models
from lfm.data.records import Completion, Edit, Fact, Image, Label, Pair, Record, Text, kind_of
from lfm.evals import evaluate

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
RECORDS: list[tuple[str, Record]] = [
    ("classifier", Label(text="so", label="cats")),
    ("classifier", Pair(text="so", text_b="so", label="cats")),
    ("vit", Image(image=np.zeros((8, 8), np.uint8), label="1")),
    ("causal", Text(text="The cat sat.")),
    ("masked", Text(text="The cat sat.")),
    ("causal", Completion(prompt="The cat", completion=" sat")),
    ("causal", Fact(subject="a", relation="b", object="Paris", prompt="It is")),
    (
        "causal",
        Edit(
            subject="a",
            relation="b",
            object="Paris",
            new_object="Rome",
            prompt="It is",
            paraphrases=("That is",),
            neighbours=(("This is", "Berlin"),),
            portability=(("Its language is", "Italian"),),
        ),
    ),
]


def told() -> dict[str, set[str]]:
    """Metrics by kind of record, as the page's table has them."""
    found: dict[str, set[str]] = {}
    kinds: list[str] = []
    for row in re.findall(r"^\| (.*?) \|$", PAGE, re.M):
        first, second, *_ = row.split(" | ") if not row.startswith("|") else ["", *row[2:].split(" | ")]
        names = set(re.findall(r"`(\w+)`", second))
        if not names:
            continue
        kinds = first.split(", ") if first.strip() else kinds
        for kind in kinds:
            found.setdefault(kind, set()).update(names)
    return found


def test_the_table_names_every_metric_and_no_other(tmp_path: Path) -> None:
    given: dict[str, set[str]] = {}
    for name, record in RECORDS:
        path = tmp_path / name
        model = models.load(path if path.exists() else getattr(tiny, name)(path))
        given.setdefault(kind_of(record), set()).update(evaluate(model, [record], bootstrap=0).metrics)
    assert given == told()
