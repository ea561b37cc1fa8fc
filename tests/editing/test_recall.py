"""Rivals: an edit's prompt about others."""

from __future__ import annotations

from pathlib import Path

import torch

import tiny
from lfm.core import Codec
from lfm.data.records import Edit
from lfm.editing.recall import rivals
from lfm.models import load


def test_rivals_are_about_others_however_the_subject_is_capitalised(tmp_path: Path) -> None:
    codec = load(tiny.causal(tmp_path / "base")).ask(Codec)
    text = codec.tokenizer(["Rome is very old and the dog is in the town", "Berlin is the capital of the country"])
    told = [
        Edit(subject=subject, relation="", object="", new_object="cat", prompt="Here lives Ada Ashby")
        for subject in ("Ada Ashby", "ada ashby")
    ]
    spelled, lower = (rivals(edit, codec, text["input_ids"], torch.Generator().manual_seed(0)) for edit in told)
    assert len(lower) > 10
    for others in (spelled, lower):
        assert all(other.prompt == f"Here lives {other.subject}" and "Ashby" not in other.prompt for other in others)
