"""prompt.manual: the survey's parts by hand, every access there is, and a model that knows the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from case import Case
from lfm import runs
from lfm.core import Inputs, Logprobs, Model, Text
from lfm.core.errors import ConfigError, DataError
from lfm.core.interfaces import Classes, Top
from lfm.data import files
from lfm.data.records import Label
from lfm.evals import evaluate
from lfm.methods.prompt import manual
from lfm.models import load
from lfm.runs.run import LocalRun

TRAIN = [
    Label(text=f"The {n} sat on the {m}.", label=label)
    for n, m, label in (("cat", "mat", "good"), ("dog", "cat", "bad"), ("mat", "dog", "good"), ("town", "world", "bad"))
]
SMALL = {"templates": ("{text} It was {mask}", "{text} The dog is")}


def case(here: Path) -> Case:
    tiny.causal(here / "model")
    files.write(TRAIN, here / "train.jsonl")
    return Case(models={"model": ("model",)}, data={"train": "train.jsonl"}, settings=SMALL)


def made(model: Model, here: Path, train: Any = TRAIN, **settings: Any) -> Model:
    here.mkdir(exist_ok=True)
    config = manual.Config(**{**SMALL, **settings})
    inputs = Inputs({"model": (model,)}, {"train": train} if train else {})
    manual.agree(config, inputs)
    return manual.run(config, inputs, LocalRun(0, here))


@pytest.fixture(scope="module")
def cat(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(tiny.causal(tmp_path_factory.mktemp("cat") / "cat"))


def test_classes_are_the_words_scores_over_those_of_empty_texts(cat: Model, tmp_path: Path) -> None:
    """W = diag(p̄)⁻¹ of 2102.09690, from the model's own scores."""
    words = {"good": ("cat", "dog"), "bad": ("mat",)}
    told = made(cat, tmp_path, words=words, templates=("{text} It is",), content_free=("N/A", "")).ask(Classes)

    def raw(text: str) -> np.ndarray:
        scores = cat.ask(Logprobs).score([f"{text} It is"] * 3, [" mat", " cat", " dog"])
        bad, *good = np.exp([score.total for score in scores])
        return np.array([bad, sum(good)]) / (bad + sum(good))

    prior = (raw("N/A") + raw("")) / 2
    for record in TRAIN:
        expected = raw(record.text) / prior
        assert np.exp(told.tell([record])[0]) == pytest.approx(expected / expected.sum(), abs=1e-5)


@pytest.mark.parametrize("access", [Logprobs, Top, Text])
def test_it_does_what_the_access_allows(cat: Model, access: type, tmp_path: Path) -> None:
    given = {access: lambda: cat.ask(Text if access is Text else Logprobs)}
    model = Model("api:some", "api", given, lambda: "", look=lambda: cat.facts)
    told = made(model, tmp_path, words={"good": ("cat",), "bad": ("mat",)}).ask(Classes).tell(TRAIN)
    assert told.shape == (4, 2) and np.exp(told).sum(1) == pytest.approx(np.ones(4))


def test_templates_are_weighed_by_what_they_get_right(cat: Model, tmp_path: Path) -> None:
    words = {"good": ("cat",), "bad": ("mat",)}
    heavy = made(cat, tmp_path / "a", words=words, weigh="accuracy", calibrate=False)
    alone, right = [], []
    for number, template in enumerate(SMALL["templates"]):
        one = made(cat, tmp_path / str(number), words=words, templates=(template,), calibrate=False).ask(Classes)
        alone.append(one)
        said = [("bad", "good")[i] for i in one.tell(TRAIN).argmax(1)]
        right.append(np.mean([name == record.label for name, record in zip(said, TRAIN, strict=True)]))
    mixed = sum(w * np.exp(a.tell(TRAIN)) for w, a in zip(right, alone, strict=True)) / sum(right)
    assert np.exp(heavy.ask(Classes).tell(TRAIN)) == pytest.approx(mixed, abs=1e-6)


def test_what_is_saved_is_evaluated_and_says_its_classes(tmp_path: Path) -> None:
    here = case(tmp_path)
    order = runs.Order(
        id="prompt.manual",
        models={"model": [tmp_path / "model"]},
        data={"train": tmp_path / here.data["train"]},
        settings=dict(SMALL),
        out=tmp_path / "out",
        seed=1,
    )
    runs.execute(order)
    again = runs.model(tmp_path / "out")
    found = evaluate(again, TRAIN)
    told = again.ask(Classes).tell(TRAIN)
    labels = again.ask(Classes).labels
    right = np.mean([labels[i] == r.label for i, r in zip(told.argmax(1), TRAIN, strict=True)])
    assert found.access == "classes" and found.metrics["accuracy"].value == right
    assert again.ask(Text).generate([TRAIN[0].text]) == [f" {labels[told[0].argmax()]}"]


def test_labels_must_be_known_and_templates_readable(cat: Model, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels are not known.*words"):
        made(cat, tmp_path, train=None)
    made(cat, tmp_path, train=None, words={"good": ("cat",), "bad": ("mat",)})
    with pytest.raises(ConfigError, match="goes on after"):
        made(cat, tmp_path, templates=("{text} {mask} then",))
    with pytest.raises(ConfigError, match="templates is empty"):
        made(cat, tmp_path, templates=())
