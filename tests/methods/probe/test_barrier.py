"""probe.barrier: the loss between models, against losses that are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from case import Case
from lfm import models, zoo
from lfm.core import Gradients, Inputs, Model
from lfm.core.errors import ConfigError, SlotError
from lfm.core.finding import Finding
from lfm.core.method import check
from lfm.data import records as data
from lfm.data.files import write
from lfm.methods.probe import barrier
from lfm.runs.run import LocalRun
from lfm.train.examine import Score
from methods.reuse import eight

LABELS = [data.Label(text=f"the {w} sat on the mat", label=w) for w in ("cats", "dogs", "birds") * 4]


def case(here: Path) -> Case:
    for seed, name in enumerate("abc"):
        tiny.classifier(here / name, seed=seed)
    write(LABELS, here / "held-out.jsonl")
    return Case({"models": ("a", "b", "c")}, {"data": "held-out.jsonl"}, {"points": 3, "triangle": 2})


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    here = tmp_path_factory.mktemp("three")
    return [models.load(tiny.classifier(here / str(seed), seed=seed)) for seed in range(3)]


def probed(given: list[Model], work: Path, data: Any = LABELS, train: Any = (), **settings: Any) -> Finding:
    inputs = Inputs({"models": tuple(given)}, {"data": data, "train": train})
    config = barrier.Config(**settings)
    barrier.agree(config, inputs)
    found = barrier.run(config, check("probe.barrier", barrier.METHOD, inputs), LocalRun(0, work))
    assert isinstance(found, Finding)
    return found


def test_a_barrier_is_the_height_above_the_line_between_the_ends() -> None:
    alphas = [0.0, 0.25, 0.5, 0.75, 1.0]
    losses = [1.0, 1.5, 4.0, 2.0, 2.0]
    right = [0.8, 0.9, 0.1, 0.5, 0.4]
    found = barrier.barrier(alphas, [Score(a, loss) for a, loss in zip(right, losses)])
    assert found == pytest.approx((2.5, 0.5, 0.5))  # 4 − 1.5 at ½; .6 − .1
    valley = barrier.barrier(alphas, [Score(0.5, loss) for loss in (1.0, 0.5, 0.2, 0.5, 1.0)])
    assert valley.loss == 0.0 and valley.accuracy == 0.0


def test_between_a_model_and_itself_there_is_none(three: list[Model], tmp_path: Path) -> None:
    found = probed([three[0], three[0]], tmp_path, points=5)
    assert found.metrics["barrier"] == pytest.approx(0, abs=1e-5)
    assert found.metrics["accuracy_barrier"] == pytest.approx(0, abs=1e-9)
    assert found.rows[0]["loss_from"] == pytest.approx(found.rows[0]["loss_to"])


def test_every_pair_is_joined_and_every_point_told(three: list[Model], tmp_path: Path) -> None:
    found = probed(three, tmp_path, points=4)
    assert [(row["from"], row["to"]) for row in found.rows] == [
        (three[a].ref, three[b].ref) for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    assert len(found.evidence) == 12 and len(found.curves) == 6
    loss = next(curve for curve in found.curves if curve.name == "loss, 1 to 3")
    assert loss.x == pytest.approx((0, 1 / 3, 2 / 3, 1)) and loss.y[0] == found.rows[0]["loss_from"]
    heights = [y - ((1 - x) * loss.y[0] + x * loss.y[-1]) for x, y in zip(loss.x, loss.y)]
    assert found.rows[1]["barrier"] == pytest.approx(max(0.0, *heights))
    assert found.metrics["barrier"] == max(row["barrier"] for row in found.rows)


def test_the_loss_of_a_linear_model_is_convex_so_no_mixture_is_worse(tmp_path: Path) -> None:
    """Cross-entropy is convex in a linear model's weights: no path or triangle rises above its corners' mixture."""
    here = [models.load(tiny.classifier(tmp_path / "0", seed=0))]
    for seed in (1, 2):  # the same body, other heads: linear in what differs
        module: Any = here[0].ask(Gradients).module()
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            module.classifier.weight.normal_(generator=random)
            module.classifier.bias.normal_(generator=random)
        here.append(here[0].ask(Gradients).rewrap(module))
    found = probed(here, tmp_path / "run", points=5, triangle=4)
    assert found.metrics["barrier"] == pytest.approx(0, abs=1e-5)
    assert found.metrics["triangle_barrier"] == pytest.approx(0, abs=1e-5)
    inside = [e for e in found.evidence if e["path"] == "triangle"]
    assert len(inside) == 15 and all(sum(e["at"]) == pytest.approx(1) for e in inside)


def test_a_bent_path_goes_round_what_a_straight_one_crosses(three: list[Model], tmp_path: Path) -> None:
    straight = probed(three[:2], tmp_path / "line", points=5)
    bent = probed(three[:2], tmp_path / "bent", train=LABELS, points=5, path="bezier", epochs=60, lr=0.01)
    worst = [max(curve.y[1:-1]) for curve in (straight.curves[0], bent.curves[0])]
    assert worst[1] < worst[0] - 0.05
    assert bent.curves[0].y[0] == pytest.approx(straight.curves[0].y[0], rel=1e-5)
    assert bent.curves[0].y[-1] == pytest.approx(straight.curves[0].y[-1], rel=1e-5)


def test_what_is_missing_is_told_before_anything_is_read(three: list[Model], tmp_path: Path) -> None:
    with pytest.raises(SlotError, match="train=FILE"):
        probed(three, tmp_path, path="bezier")
    with pytest.raises(ConfigError, match="three corners"):
        probed(three[:2], tmp_path, triangle=2)


@pytest.mark.slow
def test_experts_of_one_base_are_joined_and_models_trained_apart_are_not(tmp_path: Path) -> None:
    """The zoo: two experts fine-tuned from one base, and one of them against the ViT of another initialization.
    Measured: a barrier of 0 nats, and of 1.9 (halfway 25 % are right, of 93 and 95 at the ends)."""
    seen = eight.images("test")[::6]
    experts = eight.experts()
    apart = models.load(zoo.model("vit"))
    near = probed([experts[0], experts[3]], tmp_path / "a", data=seen, points=7)
    far = probed([experts[0], apart], tmp_path / "b", data=[r for r in seen if r.group == "identity"], points=7)
    assert near.metrics["barrier"] < 0.05 < far.metrics["barrier"]
