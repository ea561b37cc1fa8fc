"""A language model's loss through its head is that of its whole logits, whoever tells what, in one process or two."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from launching import both
from lfm.core import Gradients, launched
from lfm.data.records import Text
from lfm.distilling import lesson as lessons
from lfm.distilling import telling
from lfm.distilling.telling import HEAD, IDS, TOLD, taught
from lfm.models import load
from lfm.runs.run import LocalRun
from lfm.train import Fit, fit, world

TEXTS = [Text(text=text) for text in tiny.CORPUS[:6]]


def lesson(here: Path, kind: str, work: Path) -> Any:
    teacher, student = load(here / f"{kind}0"), load(here / f"{kind}1")
    given = lessons.lesson(TEXTS, teacher, student)
    run = LocalRun(0, work)
    return (
        given,
        student.ask(Gradients).module(),
        lessons.behind(given, teacher, run),
        lessons.told(given, teacher, run),
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        tiny.causal(here / f"causal{seed}", seed=seed)
        tiny.masked(here / f"masked{seed}", seed=seed)
    return here


@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_however_it_is_told_and_made_the_loss_is_the_same(
    kind: str, temperature: float, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, module, behind, told = lesson(models, kind, tmp_path)
    module.eval()
    chosen = list(given.numbers)
    heard, whole = behind(chosen), told(chosen)
    assert HEAD in heard and heard[TOLD].shape[-1] < whole[TOLD].shape[-1] and HEAD not in whole
    best = whole[TOLD].log_softmax(-1).topk(5, -1)
    few = {**whole, IDS: best.indices, TOLD: best.values}
    parted = taught(given, module, 0.6, temperature)
    monkeypatch.setattr(telling, "headless", lambda module, batch: None)
    plain = taught(given, module, 0.6, temperature)
    weights = [p for p in module.parameters() if p.requires_grad]

    def made(loss: Any, batch: Any) -> Any:
        value = loss(module, batch)
        return value, *torch.autograd.grad(value, weights, allow_unused=True)

    expected = made(plain, whole)
    for batch, wanted in ((heard, expected), (whole, expected), (few, made(plain, few))):
        for loss in (parted, plain):
            torch.testing.assert_close(made(loss, batch), wanted, rtol=1e-4, atol=1e-6)


def trained(here: Path, work: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    given, module, behind, _ = lesson(here, "causal", work)
    config = Fit(steps=4, batch_size=3, accumulate=2, lr=1e-3)
    losses = fit(module, given.numbers, behind, taught(given, module, 0.6, 2.0), config, LocalRun(0, work))
    return list(losses), {name: p.detach().clone() for name, p in module.named_parameters()}


def child(here: Path) -> None:
    torch.set_num_threads(1)
    for kind in ("shared", "sharded"):
        os.environ.update({"ACCELERATE_USE_FSDP": str(kind == "sharded").lower(), "FSDP_VERSION": "2"})
        assert world.sharded() is (kind == "sharded")
        losses, weights = trained(here, here / kind)
        told = {"losses": losses, "weights": {name: float(p.double().norm()) for name, p in weights.items()}}
        (here / f"{kind}.{launched.rank()}.json").write_text(json.dumps(told))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_batch_in_which_nothing_is_scored_teaches_nothing(
    alpha: float, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, module, _, told = lesson(models, "causal", tmp_path)
    batch = told(list(given.numbers))
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100), TOLD: batch[TOLD][:0]}
    for body in (telling.headless, lambda *_: None):
        monkeypatch.setattr(telling, "headless", body)
        loss = taught(given, module, alpha)(module, empty)
        loss.backward()
        assert loss.item() == 0


@pytest.mark.slow
def test_two_processes_that_share_or_shard_the_head_give_what_one_gives(models: Path, tmp_path: Path) -> None:
    both(child, models, seconds=280)
    losses, weights = trained(models, tmp_path)
    sizes = {name: float(p.double().norm()) for name, p in weights.items()}
    for kind in ("shared", "sharded"):
        for rank in range(2):
            found = json.loads((models / f"{kind}.{rank}.json").read_text())
            assert found["losses"] == pytest.approx(losses, rel=1e-5)
            assert found["weights"] == pytest.approx(sizes, rel=1e-5)
