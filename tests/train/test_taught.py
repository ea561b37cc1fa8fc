"""taught, and what is refused before any weight is read: blank records, and layers that a method cannot do with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from lfm import runs
from lfm.core import Gradients, Inputs
from lfm.core.errors import DataError, DivergedError, LfmError, MismatchError
from lfm.data import records as data
from lfm.data.files import read, write
from lfm.models import load
from lfm.models.checkpoint import StoredGradients
from lfm.runs.run import LocalRun
from lfm.train import Fit, suited, taught

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
    suited(Fit(), Inputs({"model": (model,)}, {"train": [data.Label(text="the cats", label="")]}), classed=False)


def test_a_training_that_ends_far_worse_than_guessing_is_no_result(tmp_path: Path) -> None:
    model = load(tiny.causal(tmp_path / "base"))
    records = [data.Text(text=line) for line in tiny.CORPUS[:4]]

    def trained(lr: float, work: str) -> tuple[float, ...]:
        module = model.ask(Gradients).module()
        config = Fit(steps=8, lr=lr, schedule="constant", batch_size=4)
        return taught(module, model, records, config, LocalRun(0, tmp_path / work))

    assert trained(1e-3, "learns")[-1] < 10
    with pytest.raises(DivergedError, match=r"did not learn.*guessing.*lr=3e-01"):
        trained(3.0, "leaps")


def test_the_skeleton_has_every_layer_and_no_weight(tmp_path: Path) -> None:
    gradients = load(tiny.seq2seq(tmp_path / "base")).ask(Gradients)
    skeleton, module = gradients.skeleton(), gradients.module()
    assert all(p.is_meta for p in skeleton.parameters())
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in module.named_parameters()}


@pytest.mark.parametrize(
    ("id", "settings", "form", "says"),
    [
        ("tune.bitfit", {}, "", "no bias to tune"),
        ("tune.lp_ft", {}, "", "input embedding too"),
        ("tune.lora", {"kind": "miss"}, "checkpoint", "no format 'checkpoint' with these settings.*formats: adapter"),
    ],
)
def test_what_cannot_be_done_is_refused_before_weights_are_read(
    id: str, settings: dict[str, Any], form: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.causal(tmp_path / "base", tie_word_embeddings=True)
    write([WORDED["object"]], tmp_path / "train.jsonl")

    def read_weights(*_: Any) -> torch.nn.Module:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(StoredGradients, "module", read_weights)
    given = {"model": [tmp_path / "base"]}, {"train": tmp_path / "train.jsonl"}
    order = runs.Order(id, *given, settings=settings, out=tmp_path / "out", form=form)
    with pytest.raises(LfmError, match=says) as refused:
        runs.execute(order)
    assert isinstance(refused.value, MismatchError) or form
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "train.jsonl"]
