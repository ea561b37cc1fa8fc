"""reuse.fisher: the exact diagonal, and the mean it weighs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from case import Case
from lfm import models
from lfm.core import Codec, Gradients, Model
from lfm.core.errors import ConfigError
from lfm.data import records as data
from lfm.data.files import write
from lfm.data.task import Task, task_for
from lfm.methods.reuse import fisher, linear
from lfm.models import forward
from lfm.train.fisher import fisher_diagonal
from methods.reuse import eight
from methods.reuse.merging import merge, tensors

LABELS = [data.Label(text=f"the {w} sat on the mat", label=w) for w in ("cats", "dogs", "birds") * 2]
TEXTS = [data.Text(text=line) for line in tiny.CORPUS]


def case(here: Path) -> Case:
    for seed, name in enumerate("ab"):
        tiny.classifier(here / name, seed=seed)
    write(LABELS, here / "texts.jsonl")
    return Case({"models": ("a", "b")}, {"data": "texts.jsonl"}, {"examples": 3})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    here = tmp_path_factory.mktemp("pair")
    return [models.load(tiny.classifier(here / str(seed), seed=seed)) for seed in (0, 1)]


def plain() -> Task:
    """Classes straight from the logits."""
    nothing: Any = None
    return Task("plain", "accuracy", nothing, nothing, lambda logits, b: (logits, b["labels"]), nothing, nothing)


def softmax_regression() -> tuple[nn.Linear, list[dict[str, torch.Tensor]]]:
    random = torch.Generator().manual_seed(0)
    module = nn.Linear(5, 4, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.randn(4, 5, generator=random))
    examples = [{"x": torch.randn(1, 5, generator=random), "labels": torch.tensor([i % 4])} for i in range(400)]
    return module, examples


def test_of_softmax_regression_it_is_known_in_closed_form() -> None:
    """∂ log p(y) / ∂W_c = ([y = c] − p_c) x, so that F_ci = E p_c (1 − p_c) x_i²."""
    module, examples = softmax_regression()
    x = torch.cat([example["x"] for example in examples]).double()
    p = (x @ module.weight.double().T).softmax(-1).detach()
    exact = (p * (1 - p)).T @ x.square() / len(x)
    random = torch.Generator().manual_seed(0)
    found = fisher_diagonal(module, examples, plain(), "expected", random)["weight"]
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-8)
    drawn = fisher_diagonal(module, examples, plain(), "sampled", random)["weight"]
    torch.testing.assert_close(drawn, exact, rtol=0.6, atol=0.02)  # 400 draws: within a few standard errors
    given = fisher_diagonal(module, examples, plain(), "given", random)["weight"]
    hot = torch.nn.functional.one_hot(torch.cat([e["labels"] for e in examples]), 4).double()
    torch.testing.assert_close(given, ((hot - p).square().T @ x.square()) / len(x), rtol=1e-5, atol=1e-8)


def test_examples_are_squared_one_by_one() -> None:
    """Two examples with opposite gradients: a squared sum would be zero, the Fisher information is not."""
    module = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(module.weight)
    examples = [{"x": s * torch.ones(1, 2), "labels": torch.tensor([0])} for s in (1.0, -1.0)]
    found = fisher_diagonal(module, examples, plain(), "given", torch.Generator())["weight"]
    torch.testing.assert_close(found, torch.full((2, 2), 0.25, dtype=torch.float64))


def test_the_merge_is_the_weighted_mean_written_out(pair: list[Model], tmp_path: Path) -> None:
    made, _ = eight.fuse(fisher, tmp_path, {"models": pair}, {"data": LABELS}, floor=1e-3, weights=[1, 3])
    total: dict[str, Any] = {}
    mass: dict[str, Any] = {}
    for model, weight in zip(pair, (1, 3)):
        module, codec = model.ask(Gradients).module(), model.ask(Codec)
        task = task_for(LABELS, codec, model.facts)
        squares = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in module.named_parameters()}
        for record in LABELS:
            logits = forward(module, task.collate([record]))[0]
            for c, share in enumerate(logits.softmax(-1).tolist()):
                module.zero_grad()
                logits.log_softmax(-1)[c].backward(retain_graph=True)
                for name, p in module.named_parameters():
                    squares[name] += share * (p.grad if p.grad is not None else torch.zeros_like(p)).double().square()
        norm = sum(float(s.square().sum()) for s in squares.values()) ** 0.5
        for name, p in module.named_parameters():
            share = weight * (squares[name] / norm + 1e-3)
            total[name] = total.get(name, 0) + share * p.detach().double()
            mass[name] = mass.get(name, 0) + share
    found = dict(made.ask(Gradients).module().named_parameters())
    for name in total:
        torch.testing.assert_close(found[name].double(), total[name] / mass[name], rtol=1e-4, atol=1e-5)


def test_models_that_depend_alike_on_a_parameter_are_averaged(pair: list[Model], tmp_path: Path) -> None:
    """A floor far above every entry makes all models alike; a word that no record holds has no gradient."""
    mean = tensors(merge(linear, tmp_path, {"models": pair}))
    made, _ = eight.fuse(fisher, tmp_path, {"models": pair}, {"data": LABELS}, floor=1e6)
    for name, value in tensors(made).items():
        torch.testing.assert_close(value, mean[name], rtol=1e-4, atol=1e-6)
    made, _ = eight.fuse(fisher, tmp_path, {"models": pair}, {"data": LABELS})
    words = next(name for name in mean if name.endswith("word_embeddings.weight"))
    unseen = pair[0].ask(Codec).tokenizer.convert_tokens_to_ids("painter")
    torch.testing.assert_close(tensors(made)[words][unseen], mean[words][unseen])


@pytest.mark.parametrize("name", ["causal", "masked", "seq2seq"])
def test_language_models_draw_their_answers(name: str, tmp_path: Path) -> None:
    given = [models.load(getattr(tiny, name)(tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    records = [data.Completion(prompt="the cat", completion=" sat")] * 2 if name == "seq2seq" else TEXTS[:2]
    with pytest.raises(ConfigError, match="answers=sampled"):
        eight.fuse(fisher, tmp_path, {"models": given}, {"data": records})
    made, _ = eight.fuse(fisher, tmp_path, {"models": given}, {"data": records}, answers="sampled")
    a, b = (tensors(model) for model in given)
    for key, value in tensors(made).items():
        low, high = torch.minimum(a[key], b[key]), torch.maximum(a[key], b[key])
        assert ((value >= low - 1e-5) & (value <= high + 1e-5)).all()


@pytest.mark.slow
def test_over_the_eight_tasks_it_is_better_than_the_mean(tmp_path: Path) -> None:
    """64 training images a task, each expert its own. Measured: mean .725, Fisher .733 (.734 without normalizing)."""
    groups, seen = list(eight.TASKS), eight.images("train", 64)
    made, _ = eight.fuse(fisher, tmp_path, {"models": eight.experts()}, {"data": seen}, groups=groups)
    assert eight.accuracy(made) > 0.725
