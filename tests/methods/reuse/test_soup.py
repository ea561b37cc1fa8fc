"""reuse.soup: what goes in, how much of it, and that the best single model is not lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm import models
from lfm.core import Gradients, Logits, Model
from lfm.core.errors import MismatchError
from lfm.data import records as data
from lfm.data.files import write
from lfm.methods.reuse import linear, soup
from lfm.train.examine import examiner
from methods.reuse import eight
from methods.reuse.merging import merge, tensors

LABELS = [data.Label(text=f"the {w} sat on the mat", label=w) for w in ("cats", "dogs", "birds") * 4]


def case(here: Path) -> Case:
    for seed, name in enumerate("abc"):
        tiny.classifier(here / name, seed=seed)
    write(LABELS, here / "held-out.jsonl")
    return Case({"models": ("a", "b", "c")}, {"data": "held-out.jsonl"})


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    here = tmp_path_factory.mktemp("three")
    return [models.load(tiny.classifier(here / str(seed), seed=seed)) for seed in range(3)]


def close(made: Model, expected: Model) -> None:
    found = tensors(made)
    for name, value in tensors(expected).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def moved(model: Model, scale: float) -> Model:
    """A neighbour of the model: its weights and some noise."""
    module = model.ask(Gradients).module()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=scale)
    return model.ask(Gradients).rewrap(module)


def test_uniform_is_the_plain_mean(three: list[Model], tmp_path: Path) -> None:
    made, run = eight.fuse(soup, tmp_path, {"models": three}, {"data": LABELS}, recipe="uniform")
    close(made, merge(linear, tmp_path, {"models": three}))
    assert run.notes["accuracy"] == examiner(LABELS, three[0])(made.ask(Logits).logits).accuracy


def by_hand(candidates: Sequence[Model], work: Path, by: str) -> tuple[list[int], Model]:
    """The paper's recipe 1, each soup made by reuse.linear from all its ingredients."""
    exam = examiner(LABELS, candidates[0])

    def value(model: Model) -> float:
        score = exam(model.ask(Logits).logits)
        return -score.loss if by == "loss" else score.accuracy

    loss = [exam(model.ask(Logits).logits).loss for model in candidates]
    order = sorted(range(len(candidates)), key=lambda i: (-value(candidates[i]), loss[i]))
    chosen, best = order[:1], candidates[order[0]]
    for i in order[1:]:
        tried = merge(linear, work, {"models": [candidates[j] for j in (*chosen, i)]})
        if value(tried) >= value(best):
            chosen, best = [*chosen, i], tried
    return chosen, best


@pytest.mark.parametrize("by", ["accuracy", "loss"])
def test_greedy_is_the_papers_recipe(by: str, three: list[Model], tmp_path: Path) -> None:
    candidates = [*three, moved(three[1], 0.02), moved(three[2], 0.05)]
    chosen, expected = by_hand(candidates, tmp_path, by)
    made, run = eight.fuse(soup, tmp_path, {"models": candidates}, {"data": LABELS}, by=by)
    assert run.notes["chosen"] == ", ".join(str(i + 1) for i in chosen)
    close(made, expected)
    assert len(run.curves[by]) == len(candidates)
    better = sorted(run.curves[by], reverse=by == "loss")
    assert run.curves[by] == better, "no step makes it worse"
    assert float(run.notes["accuracy"]) >= float(run.notes["best_accuracy"]) or by == "loss"


def test_a_running_mean_is_the_mean() -> None:
    values = [{"w": torch.randn(5, dtype=torch.float64)} for _ in range(6)]
    mean: dict[str, torch.Tensor] = {}
    for count, value in enumerate(values, start=1):
        mean = soup.joined(mean, value, count)
    torch.testing.assert_close(mean["w"], torch.stack([v["w"] for v in values]).mean(0))


@pytest.mark.parametrize("by_layer", [False, True])
def test_learned_weights_lower_the_loss_and_are_a_mixture(by_layer: bool, three: list[Model], tmp_path: Path) -> None:
    _, before = eight.fuse(soup, tmp_path, {"models": three}, {"data": LABELS}, recipe="uniform")
    made, run = eight.fuse(
        soup, tmp_path, {"models": three}, {"data": LABELS}, recipe="learned", by_layer=by_layer, epochs=30, lr=0.2
    )
    assert float(run.notes["loss"]) < float(before.notes["loss"]) - 0.01
    weights = [float(text) for text in str(run.notes["weights"]).split(", ")]
    assert sum(weights) == pytest.approx(1, abs=2e-3) and min(weights) >= 0
    stack = [tensors(model) for model in three]
    for name, value in tensors(made).items():
        each = torch.stack([tensor[name] for tensor in stack])
        assert (value <= each.max(0).values + 1e-5).all() and (value >= each.min(0).values - 1e-5).all()


def test_models_that_do_not_go_together_are_refused(three: list[Model], tmp_path: Path) -> None:
    wide = models.load(tiny.classifier(tmp_path / "wide", hidden_size=48))
    with pytest.raises(MismatchError, match="do not go together"):
        eight.fuse(soup, tmp_path, {"models": [three[0], wide]}, {"data": LABELS})


@pytest.mark.slow
def test_over_the_eight_tasks_a_soup_beats_its_best_ingredient(tmp_path: Path) -> None:
    """The zoo's eight experts, 60 training images a task to choose on. Measured on the test images: the best
    single model .679, uniform .725, greedy (two of the eight) .709, learned .734."""
    experts, held = eight.experts(), eight.images("train", 60)
    reached = {}
    for recipe in ("uniform", "greedy", "learned"):
        made, _ = eight.fuse(soup, tmp_path, {"models": experts}, {"data": held}, recipe=recipe)
        reached[recipe] = eight.accuracy(made)
    single = max(eight.accuracy(expert) for expert in experts)
    assert reached["greedy"] > single and reached["uniform"] > single and reached["learned"] > single
