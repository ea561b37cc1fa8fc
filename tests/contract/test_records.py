"""Whatever learns from records refuses the one that has no class or no words by its file and line, before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import contract
from case import Case
from lfm import runs
from lfm.core import registry
from lfm.core.errors import DataError
from lfm.core.method import Data
from lfm.data import records as data
from lfm.data.files import read, write

UNREAD = ("distill.cache", "distill.cross_tokenizer", "distill.on_policy")
"""Methods that learn from a teacher alone, whatever classes the records say."""

LEARNING = [
    (id, role)
    for id in sorted(id for id, module in registry.ids().items() if module.startswith("lfm.methods."))
    for role, slot in registry.get(id).method.data.items()
    if role == "train" or slot.level >= Data.FEW_SHOT
]
CLASSED = [
    (id, role)
    for id, role in LEARNING
    if id not in UNREAD and {"label", "image"} & {*registry.get(id).method.data[role].kinds}
]


def order_with(id: str, role: str, records: list[Any], case: Case, here: Path) -> runs.Order:
    """The method's own case, with these records for that role."""
    write(records, here / "faulty.jsonl")
    asked = contract.order(id, case, here, "out")
    known = {field.name for field in msgspec.structs.fields(registry.get(id).method.config)}
    more = {"alpha": 0.5} if id.startswith("distill.") and "alpha" in known else {}  # classes are learned too
    return replace(asked, data={**asked.data, role: here / "faulty.jsonl"}, settings={**asked.settings, **more})


def records_of(id: str, role: str, case: Case, here: Path) -> list[Any]:
    """Those of the method's own case where they have classes, else labelled texts or images."""
    found = list(read(here / case.data[role])) if role in case.data else []
    if found and hasattr(found[0], "label"):
        return found
    if "label" not in registry.get(id).method.data[role].kinds:
        return [data.Image(image=np.full((8, 8), 60 * i, np.uint8), label=f"{i}") for i in range(3)]
    return [data.Label(text=f"the {word} sat on the mat", label=word) for word in ("cats", "dogs", "birds")]


@pytest.mark.parametrize(("id", "role"), CLASSED)
def test_a_record_without_a_class_is_refused_by_its_line(id: str, role: str, tmp_path: Path) -> None:
    case = contract.case_of(id)(tmp_path)
    records = records_of(id, role, case, tmp_path)
    records[1] = msgspec.structs.replace(records[1], label="")
    with pytest.raises(DataError, match=r"faulty.jsonl:2: 'label' is blank"):
        runs.prepare(order_with(id, role, records, case, tmp_path))
    assert not (tmp_path / "out").exists()


WORDED = [(id, role) for id, role in LEARNING if {"text", "label"} & {*registry.get(id).method.data[role].kinds}]


@pytest.mark.parametrize(("id", "role"), WORDED)
def test_a_record_without_words_is_refused_by_its_line(id: str, role: str, tmp_path: Path) -> None:
    kinds = registry.get(id).method.data[role].kinds
    words = ("the cats sat on the mat", " ", "the dogs sat")
    made = [data.Text(text=w) if "text" in kinds else data.Label(text=w, label=f"c{i}") for i, w in enumerate(words)]
    with pytest.raises(DataError, match=r"faulty.jsonl:2: 'text' is blank"):
        runs.prepare(order_with(id, role, made, contract.case_of(id)(tmp_path), tmp_path))


def test_the_table_has_every_method_that_trains() -> None:
    """So that the two tests above do not pass for want of anything to try."""
    assert len({id for id, _ in CLASSED}) > 30 and len({id for id, _ in WORDED}) > 30
