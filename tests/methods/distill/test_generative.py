"""Students of generators: a kind is its weights, every question is counted, and what that is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from case import Case
from lfm.core import Codec, Inputs, Logits, Model
from lfm.core.errors import ConfigError
from lfm.core.method import check
from lfm.data.task import task_for
from lfm.methods.distill import generative
from lfm.models import load
from lfm.runs.run import LocalRun

QUICK: dict[str, Any] = {"steps": 4, "batch_size": 4, "bank": 16, "width": 4, "latent": 8, "before": 1}


def distill(teacher: Model, student: Model, work: Path, seed: int = 0, **settings: Any) -> tuple[Model, LocalRun]:
    inputs = Inputs({"teacher": (teacher,), "student": (student,)})
    config = generative.Config(**settings)
    generative.agree(config, inputs)
    run = LocalRun(seed, work)
    made = generative.run(config, check("distill.generative", generative.METHOD, inputs), run)
    assert isinstance(made, Model)
    return made, run


def case(here: Path) -> Case:
    tiny.vit(here / "big", num_hidden_layers=1)
    tiny.vit(here / "small", seed=1, num_hidden_layers=1)
    settings = QUICK | {"every": 2, "rounds": 2, "contrast": 0.5, "checkpoint_every": 0.0}
    return Case({"teacher": ("big",), "student": ("small",)}, {}, settings)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    root = tmp_path_factory.mktemp("models")
    return load(tiny.vit(root / "big")), load(tiny.vit(root / "small", seed=1, num_hidden_layers=1))


@pytest.mark.parametrize(
    "kind, weights",
    [
        ("zskt", {"adv": 1.0, "bn": 0.0, "oh": 0.0, "bal": 0.0, "act": 0.0}),
        ("dfq", {"adv": 1.0, "bn": 1.0, "oh": 1.0, "bal": 20.0, "act": 0.0, "every": 10}),
    ],
)
def test_a_kind_is_its_weights(pair: tuple[Model, Model], tmp_path: Path, kind: Any, weights: dict[str, Any]) -> None:
    own, _ = distill(*pair, tmp_path / "own", kind=kind, **QUICK)
    spelled, _ = distill(*pair, tmp_path / "spelled", kind="dafl", **QUICK, **weights)
    other, _ = distill(*pair, tmp_path / "other", kind="dafl", **QUICK)
    assert own.digest == spelled.digest != other.digest


@pytest.mark.parametrize(
    "kind, settings, asked",
    [
        # each student's step asks of 4 new pictures, each of two rounds of 4
        ("zskt", {"every": 2}, 4 * 4 + 2 * 4),
        # three rounds (one before) of 2 steps; what is kept is asked once, and what the student reads not again
        ("fast", {"every": 2, "rounds": 2}, 3 * (2 * 4 + 4)),
        # whole and part of each picture
        ("cmi", {"every": 2, "rounds": 2}, 3 * (2 * 2 * 4 + 4)),
        # what is moved is asked at each step, and not before
        ("fast", {"every": 2, "rounds": 2, "jitter": 0.2}, 3 * 2 * 4 + 4 * 4),
    ],
)
def test_every_question_is_counted(
    pair: tuple[Model, Model], tmp_path: Path, kind: Any, settings: dict[str, Any], asked: int
) -> None:
    _, run = distill(*pair, tmp_path, kind=kind, **(QUICK | settings))
    assert run.notes["queries"] == asked


def test_contrast_needs_pictures_that_are_kept(pair: tuple[Model, Model], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keeps no pictures"):
        distill(*pair, tmp_path, kind="dafl", contrast=0.8)


def accuracy(model: Model, records: Any) -> float:
    task = task_for(records, model.ask(Codec), model.facts)
    batch = task.collate(records)
    logits, labels = task.scored(model.ask(Logits).logits(batch), batch)
    return (logits.argmax(-1) == labels).double().mean().item()
