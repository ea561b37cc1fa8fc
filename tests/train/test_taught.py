"""taught, and what is refused before any weight is read: layers that a method cannot do with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from lfm import runs
from lfm.core import Gradients
from lfm.core.errors import DivergedError, LfmError, MismatchError
from lfm.data import records as data
from lfm.data.files import read, write
from lfm.models import load
from lfm.models.checkpoint import StoredGradients
from lfm.runs.run import LocalRun
from lfm.train import Fit, taught
from lfm.train.taught import plain


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
    write([data.Fact(subject="cats", relation="is", object="happy", prompt="cats are")], tmp_path / "train.jsonl")

    def read_weights(*_: Any) -> torch.nn.Module:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(StoredGradients, "module", read_weights)
    given = {"model": [tmp_path / "base"]}, {"train": tmp_path / "train.jsonl"}
    order = runs.Order(id, *given, settings=settings, out=tmp_path / "out", form=form)
    with pytest.raises(LfmError, match=says) as refused:
        runs.execute(order)
    assert isinstance(refused.value, MismatchError) or form
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "train.jsonl"]


def test_what_a_training_broke_on_is_named_as_it_was_read(tmp_path: Path) -> None:
    """A text longer than the context is read in pieces, which all stand in its line."""
    model = load(tiny.causal(tmp_path / "base", max_position_embeddings=16))
    write(
        [data.Text(text=line) for line in ("the cat", "the cats sat on the mat and the dog ran", "dogs")],
        tmp_path / "a.jsonl",
    )
    with pytest.raises(DivergedError, match=r"step 0 on records \S*a.jsonl:1, \S*a.jsonl:2, \S*a.jsonl:3\."):
        taught(
            model.ask(Gradients).module(),
            model,
            read(tmp_path / "a.jsonl"),
            Fit(steps=1, batch_size=8),
            LocalRun(0, tmp_path / "work"),
            objective=lambda module, batch, task: plain(module, batch, task) * math.nan,
        )
