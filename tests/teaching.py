"""What tests of several teachers and several students share: a method run by itself, answers, digits in two views."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lfm.core import Codec, Gradients, Inputs, Logits, Method, Model
from lfm.core.method import check
from lfm.data import records as data
from lfm.data.task import task_for
from lfm.models import forward
from lfm.runs.run import LocalRun
from lfm.train import Fit, fit, once

QUICK: Mapping[str, Any] = {"steps": 20, "lr": 5e-3, "batch_size": 4, "precision": "fp32"}


def made(
    method: Method[Any],
    models: Mapping[str, Sequence[Model]],
    records: Mapping[str, Any],
    work: Path,
    seed: int = 0,
    **settings: Any,
) -> tuple[Model, LocalRun]:
    """What a method makes, quickly, and the run with its notes."""
    inputs = Inputs({role: tuple(given) for role, given in models.items()}, records)
    config = method.config(**{**QUICK, **settings})
    if method.agree:
        method.agree(config, inputs)
    run = LocalRun(seed, work)
    result = method.run(config, check("distill", method, inputs), run)
    assert isinstance(result, Model)
    return result, run


def supervised(model: Model, records: Any, work: Path, seed: int = 0, name: str = "fit", **settings: Any) -> Model:
    """The model trained on labels alone. name: of the training, by which the order of the records is drawn."""
    task = task_for(records, model.ask(Codec), model.facts)
    module = model.ask(Gradients).module()
    numbers, collate = once(records, task.collate)
    config = Fit(**{**QUICK, **settings})
    fit(module, numbers, collate, lambda m, b: task.loss(forward(m, b), b), config, LocalRun(seed, work), name=name)
    return model.ask(Gradients).rewrap(module)


def mute(model: Model) -> Model:
    """The same, which fails whoever asks for its logits."""

    def asked() -> Any:
        raise AssertionError("the teacher is asked")

    return replace(model, gives={**model.gives, Logits: asked}, _opened={})


def answers(model: Model, records: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, V) logits of what the records score, and (N,) what is right."""
    task = task_for(records, model.ask(Codec), model.facts)
    batch = task.collate(records)
    return task.scored(model.ask(Logits).logits(batch), batch)


def accuracy(model: Model, records: Any) -> float:
    logits, labels = answers(model, records)
    return (logits.argmax(-1) == labels).double().mean().item()


def reordered(model: Model, order: Sequence[int]) -> Model:
    """The same classifier with its classes in another order."""
    module: Any = model.ask(Gradients).module()
    with torch.no_grad():
        for parameter in module.classifier.parameters():
            parameter.copy_(parameter[list(order)].clone())
    names = [model.facts.labels[i] for i in order]
    module.config.id2label, module.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    moved = model.ask(Gradients).rewrap(module)
    assert moved.facts.labels == tuple(names)
    return moved


def still(directory: Path) -> Path:
    """The same model without dropout."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {key: 0.0 for key in config if key.endswith(("dropout", "dropout_prob"))}))
    return directory


def digits() -> list[data.Image]:
    """scikit-learn's 1797 digits, shuffled once."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return [data.Image(image=(found.images[i] * 15.9).astype(np.uint8), label=str(found.target[i])) for i in order]


def written(image: data.Image) -> data.Label:
    """A digit as a text: a letter for each of its 64 points, a (dark) to q (bright), a word a row."""
    letters = [["abcdefghijklmnopq"[int(point) // 15] for point in row] for row in image.image]
    return data.Label(text=" ".join("".join(row) for row in letters), label=image.label)


def means(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each; told too, with what the seeds gave, for who asks pytest to show it (-s)."""
    for name, found in scores.items():
        print(f"{name:24}{np.mean(found):.4f} ± {np.std(found, ddof=1):.4f}")
    return {name: float(np.mean(found)) for name, found in scores.items()}


def loss(model: Model, records: Any) -> float:
    """The mean cross-entropy of the right answers, in nats."""
    return torch.nn.functional.cross_entropy(*answers(model, records)).item()
