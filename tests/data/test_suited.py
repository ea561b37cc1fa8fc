"""What records are refused for, by file and line, before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from lfm.core import Codec, Inputs
from lfm.core.errors import DataError
from lfm.data import records as data
from lfm.data.files import read, write
from lfm.models import load
from lfm.train import Fit, suited

BLANK: dict[str, Any] = {
    "text": data.Text(text=" \n"),
    "label": data.Label(text="", label="cats"),
    "text_b": data.Pair(text="the cats", text_b="\t", label="cats"),
    "completion": data.Completion(prompt="the cats", completion=" "),
    "object": data.Fact(subject="cats", relation="is", object="", prompt="cats are"),
}
WORDED: dict[str, Any] = {
    "text": data.Text(text="the cats sat"),
    "label": data.Label(text="the cats sat", label="cats"),
    "text_b": data.Pair(text="the cats", text_b="sat", label="cats"),
    "completion": data.Completion(prompt="", completion="the cats sat"),
    "object": data.Fact(subject="cats", relation="is", object="happy", prompt="cats are"),
}


@pytest.mark.parametrize("kind", BLANK)
def test_a_blank_record_is_refused_by_its_line_and_an_empty_prompt_is_none(kind: str, tmp_path: Path) -> None:
    write([WORDED[kind], BLANK[kind], WORDED[kind]], tmp_path / "train.jsonl")
    suited(Fit(), Inputs({}, {"train": [WORDED[kind]]}))
    field = "text" if kind == "label" else kind
    with pytest.raises(DataError, match=f"train.jsonl:2: '{field}' is blank"):
        suited(Fit(), Inputs({}, {"train": read(tmp_path / "train.jsonl")}))


def test_a_record_without_a_class_and_an_answer_beyond_the_context_are_refused_by_their_lines(tmp_path: Path) -> None:
    """Before any step: a training would come to them somewhere in its first epoch."""
    model = load(tiny.causal(tmp_path / "base", max_position_embeddings=16))

    def refused(record: data.Record, says: str, *, good: data.Record) -> None:
        write([good, good, record], tmp_path / "train.jsonl")
        with pytest.raises(DataError, match=f"train.jsonl:3: {says}"):
            suited(Fit(), Inputs({"model": (model,)}, {"train": read(tmp_path / "train.jsonl")}))

    refused(data.Label(text="the cats", label=" "), "'label' is blank", good=WORDED["label"])
    long = data.Completion(prompt="the cats", completion=" sat on the mat" * 8)
    refused(long, "an answer of .* does not fit the model's context of 16", good=WORDED["completion"])
    suited(Fit(), Inputs({"model": (model,)}, {"train": [data.Label(text="the cats", label="")]}), learns="")


def test_what_is_held_out_is_of_the_kind_that_is_learned(tmp_path: Path) -> None:
    model = load(tiny.causal(tmp_path / "base"))
    write([WORDED["label"]], tmp_path / "train.jsonl")
    write([WORDED["text"]], tmp_path / "dev.jsonl")
    given = {role: read(tmp_path / f"{role}.jsonl") for role in ("train", "dev")}
    with pytest.raises(DataError, match=r"dev.jsonl:1: a text record, and train holds label records"):
        suited(Fit(), Inputs({"model": (model,)}, given))


# Wav2vec2's own numbers (arXiv 2006.11477, section 4.2): 400 samples a step, each 320 after the one before.
KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)


@pytest.mark.parametrize("rate", [tiny.RATE, 2 * tiny.RATE])
def test_a_sound_too_short_for_the_convolutions_is_refused_by_its_line(rate: int, tmp_path: Path) -> None:
    """One sample less than a step, and one sample less than what the model masks as it trains: 9 steps more."""
    convolved = {"conv_kernel": KERNELS, "conv_stride": STRIDES, "conv_dim": (8,) * 7, "num_feat_extract_layers": 7}
    plain = load(tiny.hearer(tmp_path / "plain", **convolved, apply_spec_augment=False))
    masked = load(tiny.hearer(tmp_path / "masked", **convolved, mask_time_prob=0.05, mask_time_length=10))

    def sound(samples: int) -> data.Audio:
        there = samples * rate // tiny.RATE
        return data.Audio(audio=(np.sin(np.arange(there, dtype=np.float32)), rate), label="low")

    def learned(model: Any, *sounds: data.Audio) -> None:
        write([sound(4000), *sounds], tmp_path / "train.jsonl")
        suited(Fit(), Inputs({"model": (model,)}, {"train": read(tmp_path / "train.jsonl")}))

    learned(plain, sound(400))
    learned(masked, sound(400 + 9 * 320))
    with pytest.raises(DataError, match=r"train.jsonl:2: a sound of 24.9 ms is too short.*400 samples.*25 ms") as told:
        learned(plain, sound(399))
    assert "or leave it out" in told.value.fix
    with pytest.raises(DataError, match=r"train.jsonl:2: .*masks spans of 10 steps.*3280 samples.*205 ms"):
        learned(masked, sound(399 + 9 * 320))
    plain.ask(Codec).sounds([sound(400).audio])
    masked.ask(Codec).sounds([sound(400).audio])  # whoever only asks it is not masked
    with pytest.raises(DataError, match="too short"):
        plain.ask(Codec).sounds([sound(399).audio])
