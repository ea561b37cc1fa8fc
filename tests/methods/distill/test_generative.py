"""Students of generators: a kind is its weights, every question is counted, and what that is worth."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tiny
from case import Case
from lfm import runs
from lfm.core import Codec, Gradients, Inputs, Logits, Model
from lfm.core.errors import ConfigError
from lfm.core.method import check
from lfm.data.task import task_for
from lfm.methods.distill import generative
from lfm.models import forward, load
from lfm.runs import refs
from lfm.runs.run import LocalRun
from lfm.train import Fit, fit, seeded

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


@pytest.mark.slow
def test_a_student_reads_digits_that_it_never_saw(tmp_path: Path) -> None:
    """A block of the zoo's ViT with new weights, on what a generator makes against it: far above chance, and far
    below the 90 % that 300 real images and their classes give it in as many steps (benchmarks/data_free.py)."""
    teacher, records = runs.model("zoo:vit"), refs.records("zoo:digits-test")
    settings: dict[str, Any] = {"layers": 1, "start": "random", "steps": 300, "latent": 64, "width": 16}
    made, run = distill(teacher, teacher, tmp_path / "run", kind="zskt", **settings)
    rate = accuracy(made, records)
    assert accuracy(teacher, records) > 0.95 and 0.25 < rate < 0.9, rate
    assert run.notes["queries"] == 300 * 64 + 60 * 64


def conv(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for given, wide in pairwise((3, *widths)):
        stride = 2 if given == widths[0] else 1
        layers += [nn.Conv2d(given, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def bare(build: Any, path: Path, train: Any = lambda module: None) -> Model:
    with seeded(0):
        module = build()
    train(module)
    save_file({name: tensor for name, tensor in module.state_dict().items() if tensor.ndim}, path)
    return load(path, module=build)


@pytest.mark.slow
def test_what_batch_norms_remember_makes_pictures_worth_learning_from(tmp_path: Path) -> None:
    """`fast` into a smaller network, from a teacher of digits with batch norms, with their statistics and without."""
    codec = runs.model("zoo:vit").ask(Codec)

    def digits(part: str) -> tuple[torch.Tensor, torch.Tensor]:
        records: Any = refs.records(f"zoo:digits{part}")
        pixels = codec.images([record.image for record in records])["pixel_values"]
        return pixels, torch.tensor([int(record.label) for record in records])

    (pixels, classes), (shown, right) = digits(""), digits("-test")

    def train(module: nn.Module) -> None:
        fit(
            module,
            range(len(pixels)),
            lambda chosen: {"pixel_values": pixels[list(chosen)], "labels": classes[list(chosen)]},
            lambda m, batch: nn.functional.cross_entropy(forward(m, batch), batch["labels"]),
            Fit(epochs=12, batch_size=64, lr=3e-3),
            LocalRun(0, tmp_path / "teacher"),
        )

    def rate(model: Model) -> float:
        with torch.no_grad():
            told = forward(model.ask(Gradients).module(), {"pixel_values": shown})
        return (told.argmax(-1) == right).double().mean().item()

    teacher = bare(partial(conv, 32, 64, 128, 128), tmp_path / "teacher.safetensors", train)
    student = bare(partial(conv, 16, 32, 64), tmp_path / "student.safetensors")
    settings: dict[str, Any] = {"steps": 300, "latent": 64, "width": 16, "image": (3, 8, 8)}
    settings |= {"mean": (0.31,) * 3, "std": (0.38,) * 3}
    rates = {
        bn: rate(distill(teacher, student, tmp_path / str(bn), kind="fast", bn=bn, **settings)[0]) for bn in (10.0, 0.0)
    }
    assert rate(teacher) > 0.97 and rates[10.0] > rates[0.0] + 0.1 and rates[10.0] > 0.4, rates


def test_a_bank_smaller_than_a_batch_matters_only_where_pictures_are_kept(
    pair: tuple[Model, Model], tmp_path: Path
) -> None:
    small = QUICK | {"bank": 2}
    with pytest.raises(ConfigError, match="no batch of 4"):
        distill(*pair, tmp_path / "kept", **small, kind="fast")
    made, _ = distill(*pair, tmp_path / "a", **small, kind="dafl")
    other, _ = distill(*pair, tmp_path / "b", **QUICK, kind="dafl")
    assert made.digest == other.digest
