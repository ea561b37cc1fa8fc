"""Mutual learning: the loss written out, peers that read in their own ways, and which of them is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tiny
from case import Case
from lfm.core import Gradients
from lfm.core.errors import ConfigError, MismatchError
from lfm.data import records as data
from lfm.data.files import write
from lfm.methods.distill import online
from lfm.models import load
from teaching import accuracy, answers, digits, loss, made, means, reordered, still, supervised

LABELS = [data.Label(text=f"the {w} sat on the mat", label=w) for w in ("cats", "dogs", "birds") * 4]
TEXTS = [data.Text(text=line) for line in tiny.CORPUS]


def case(here: Path) -> Case:
    tiny.classifier(here / "one", hidden_size=48)
    tiny.classifier(here / "two", seed=2)
    write(LABELS, here / "texts.jsonl")
    settings = {"steps": 6, "batch_size": 4, "checkpoint_every": 0.0}
    return Case({"student": ("one", "two")}, {"train": "texts.jsonl"}, settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed in range(3):
        still(tiny.classifier(root / f"classifier{seed}", seed=seed))
        tiny.causal(root / f"causal{seed}", seed=seed)
        still(tiny.masked(root / f"masked{seed}", seed=seed))
    return root


def mutual(peers: Any, records: Any, work: Path, dev: Any = (), **settings: Any) -> Any:
    given = {"train": records} | ({"dev": dev} if dev else {})
    return made(online.METHOD, {"student": peers}, given, work, **settings)


@pytest.mark.parametrize("name", ["classifier", "causal"])
@pytest.mark.parametrize("count", [2, 3])
def test_the_first_loss_is_the_papers_written_out(name: str, count: int, root: Path, tmp_path: Path) -> None:
    """The mean over peers of CE + β/(K − 1) Σ_j T² KL(p_j ‖ p_k), from each one's own logits."""
    records = LABELS[:4] if name == "classifier" else TEXTS[:4]
    peers = [load(root / f"{name}{seed}") for seed in range(count)]
    _, run = mutual(peers, records, tmp_path, steps=1, beta=0.7, temperature=2.0)
    told = [answers(peer, records) for peer in peers]
    p = [logits.double().div(2).log_softmax(-1) for logits, _ in told]
    expected = 0.0
    for k, (logits, labels) in enumerate(told):
        expected += F.cross_entropy(logits, labels).item() / count
        for j in range(count):
            if j != k:
                apart = (p[j].exp() * (p[j] - p[k])).sum(-1).mean().item()
                expected += 0.7 * 4 * apart / (count - 1) / count
    assert run.notes["loss_before"] == pytest.approx(expected, rel=1e-4)


def test_no_gradient_passes_through_what_the_others_answer(root: Path, tmp_path: Path) -> None:
    """AdamW's first step goes by the gradient's sign: it is that of the first peer's own loss."""
    peers = [load(root / f"classifier{seed}") for seed in range(2)]
    rate = 1e-6
    given, _ = mutual(peers, LABELS[:4], tmp_path, steps=1, lr=rate, warmup=0.0, weight_decay=0.0, clip=0.0, beta=2.0)
    module = peers[0].ask(Gradients).module()
    from lfm.core import Codec
    from lfm.data.task import task_for
    from lfm.models import forward

    task = task_for(LABELS[:4], peers[0].ask(Codec), peers[0].facts)
    batch = task.collate(LABELS[:4])
    mine, labels = task.scored(forward(module, batch), batch)
    theirs = answers(peers[1], LABELS[:4])[0].log_softmax(-1)
    own = F.cross_entropy(mine, labels) + 2 * F.kl_div(
        mine.log_softmax(-1), theirs, log_target=True, reduction="batchmean"
    )
    own.backward()
    moved = given.ask(Gradients).module().state_dict()
    checked = 0
    for name, parameter in module.named_parameters():
        clear = parameter.grad.abs() > 1e-4 if parameter.grad is not None else torch.zeros(())
        signs = torch.sign(parameter.detach() - moved[name])[clear.bool()]
        checked += len(signs)
        if len(signs):
            assert (signs == torch.sign(parameter.grad[clear])).double().mean() > 0.99, name  # type: ignore[index]
    assert checked > 1000


def test_alone_together_is_supervised_training(root: Path, tmp_path: Path) -> None:
    """With β = 0 the first peer learns what it would by itself, on the same batches."""
    peers = [load(root / f"classifier{seed}") for seed in range(2)]
    settings: dict[str, Any] = {"clip": 0.0, "weight_decay": 0.0, "steps": 8}
    given, _ = mutual(peers, LABELS, tmp_path / "a", beta=0.0, **settings)
    alone = supervised(peers[0], LABELS, tmp_path / "b", **settings)
    torch.testing.assert_close(answers(given, LABELS)[0], answers(alone, LABELS)[0], rtol=1e-2, atol=1e-2)


def test_peers_read_with_their_own_eyes_and_match_classes_by_name(tmp_path: Path) -> None:
    """A peer whose classes stand in another order, and whose images are scaled otherwise, is the same peer."""
    one = still(tiny.vit(tmp_path / "one", seed=0))
    other = still(tiny.vit(tmp_path / "other", seed=1, labels=tiny.DIGITS))
    moved = reordered(load(other), [*range(1, 10), 0])
    draw = np.random.default_rng(0)
    images = [data.Image(image=draw.integers(0, 255, (8, 8), np.uint8), label=str(i)) for i in range(8)]
    losses = [
        mutual([load(one), peer], images, tmp_path / str(i), steps=4)[1].notes
        for i, peer in enumerate((load(other), moved))
    ]
    assert losses[0]["loss_before"] == pytest.approx(losses[1]["loss_before"], rel=1e-4)
    assert losses[0]["loss_after"] == pytest.approx(losses[1]["loss_after"], rel=1e-2)


@pytest.mark.parametrize("name", ["classifier", "masked"])
def test_the_best_on_held_out_records_is_given(name: str, root: Path, tmp_path: Path) -> None:
    records = LABELS if name == "classifier" else TEXTS
    peers = [load(root / f"{name}{seed}") for seed in range(2)]
    given, run = mutual(peers, records, tmp_path, dev=records[:3], start="random", patience=3)
    found = [run.notes[f"dev loss {k}"] for k in range(2)]
    assert run.notes["chosen"] == found.index(min(found))
    assert given.facts.parameters == peers[0].facts.parameters


def test_activations_may_be_computed_again(root: Path, tmp_path: Path) -> None:
    peers = [load(root / f"causal{seed}") for seed in range(2)]
    one, other = (
        mutual(peers, TEXTS, tmp_path / str(a), steps=3, activation_checkpointing=a)[0] for a in (True, False)
    )
    assert one.digest == other.digest


def test_one_architecture_twice_begins_twice(root: Path, tmp_path: Path) -> None:
    peer = load(root / "classifier0")
    with pytest.raises(ConfigError, match="begin with the same weights"):
        mutual([peer, peer], LABELS, tmp_path)
    _, run = mutual([peer, peer], LABELS, tmp_path, start="random", dev=LABELS)
    assert run.notes["dev loss 0"] != run.notes["dev loss 1"]
    with pytest.raises(MismatchError, match="cannot learn the answers"):
        mutual([peer, load(root / "causal0")], LABELS, tmp_path)


@pytest.mark.slow
def test_peers_learn_no_less_together_than_apart(tmp_path: Path) -> None:
    """Two small ViTs on 300 of scikit-learn's digits, together, and the first by itself; three seeds."""
    every = digits()
    scores: dict[str, list[float]] = {}
    for seed in range(3):
        some = [every[i] for i in np.random.default_rng(seed).permutation(1200)[:300]]
        shape: dict[str, Any] = {"hidden_size": 64, "initializer_range": 0.1}
        peers = [load(tiny.vit(tmp_path / f"{seed}{k}", seed=10 * seed + k, **shape)) for k in range(2)]
        fit: dict[str, Any] = {"steps": 150, "batch_size": 32, "lr": 3e-3}
        alone = supervised(peers[0], some, tmp_path / f"a{seed}", seed, **fit)
        given, _ = mutual(peers, some, tmp_path / f"o{seed}", seed=seed, **fit)
        for name, model in (("alone", alone), ("together", given)):
            scores.setdefault(f"{name}: accuracy", []).append(accuracy(model, every[1200:]))
            scores.setdefault(f"{name}: loss", []).append(loss(model, every[1200:]))
    mean = means(scores)
    assert mean["together: loss"] < mean["alone: loss"] + 0.02
    assert mean["together: accuracy"] > mean["alone: accuracy"] - 0.02
