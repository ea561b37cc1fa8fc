"""CAKE: the contrast as the paper writes it, the boundary that pictures end at, and what a student learns there."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from case import Case
from lfm.core import Codec, Gradients, Inputs, Model
from lfm.core.method import check
from lfm.data.task import task_for
from lfm.distilling.datafree import PIXELS, Scene, Teacher, scene
from lfm.distilling.pictures import Frame
from lfm.distilling.telling import TOLD
from lfm.methods.distill import cake
from lfm.models import forward, load
from lfm.runs.run import LocalRun

SMALL: dict[str, Any] = {"steps": 6, "batch_size": 8, "pictures": 8, "every": 3, "iterations": 2, "groups": 4}


def case(here: Path) -> Case:
    tiny.vit(here / "big", hidden_size=48)
    tiny.vit(here / "small", seed=1)
    return Case({"teacher": ("big",), "student": ("small",)}, {}, SMALL | {"checkpoint_every": 0.0})


def test_the_contrast_is_the_sum_over_pairs() -> None:
    told = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs = itertools.combinations(range(4), 2)
    written = sum(nn.functional.mse_loss(told[:, i], told[:, j]) for i, j in pairs)
    assert torch.allclose(cake.contrast(told), torch.as_tensor(written))
    # as the authors' code has it: a mean over all ordered pairs, a picture with itself too, by half of groups squared
    whole = nn.functional.mse_loss(told.unsqueeze(1).expand(3, 4, 4, 5), told.unsqueeze(2).expand(3, 4, 4, 5))
    assert torch.allclose(cake.contrast(told), whole * 0.5 * 4**2)


def test_the_rate_falls_by_its_decades() -> None:
    config = cake.Config(steps=400, every=100, decades=4.0, picture_lr=0.1)
    assert [cake.pace(config, step) for step in (0, 99, 100, 300)] == pytest.approx([1e-1, 1e-1, 1e-2, 1e-4])
    config = cake.Config(steps=301, every=100, decades=4.0, picture_lr=0.1)
    assert [cake.pace(config, step) for step in (0, 100, 300)] == pytest.approx([1e-1, 1e-2, 1e-4]), "four batches too"


def test_pictures_are_made_each_so_many_steps_at_their_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, float]] = []

    def distil(scene: Any, synthesise: Any, *_: Any) -> None:
        monkeypatch.setattr(cake, "pictures", lambda config, scene, rate: rate)
        made.extend((step, rows) for step in range(6) if (rows := synthesise(step, None)) is not None)

    monkeypatch.setattr(cake.datafree, "distil", distil)
    model = load(tiny.vit(tmp_path / "big"))
    settings: dict[str, Any] = SMALL | {"picture_lr": 0.1, "decades": 2.0}
    config = cake.Config(**settings)
    inputs = Inputs({"teacher": (model,), "student": (model,)})
    cake.run(config, check("distill.cake", cake.METHOD, inputs), LocalRun(0, tmp_path / "run"))
    assert made == [(0, pytest.approx(0.1)), (3, pytest.approx(0.01))]


def test_no_group_has_a_class_twice() -> None:
    assert cake.shape(cake.Config(pictures=8, groups=4), 10) == (2, 4)
    assert cake.shape(cake.Config(pictures=8, groups=4), 3) == (2, 3)


def test_pictures_end_at_the_boundary_where_the_contrast_pulls_and_far_from_it_where_not() -> None:
    """Of a linear teacher of two classes: the margin is the distance to its boundary, times the weight's length."""
    torch.manual_seed(0)
    linear = nn.Linear(3 * 4 * 4, 2)
    frame = Frame((3, 4, 4), torch.full((3, 1, 1), -1.0), torch.ones(3, 1, 1))
    tell = Teacher(lambda images: linear(images.flatten(1)))
    stage = Scene(frame, 2, tell, linear, lambda images: images, ())
    margins: dict[float, float] = {}
    for attract in (0.0, 10.0):
        config = cake.Config(pictures=16, groups=2, iterations=200, classify=1.0, attract=attract, tv=0.0)
        torch.manual_seed(1)
        told = cake.pictures(config, stage, 1.0)[TOLD]
        assert len(told) == 16
        margins[attract] = (told[:, 0] - told[:, 1]).abs().mean().item()
    assert margins[10.0] < 0.2 * margins[0.0], margins


def test_one_step_is_down_the_loss_written_out_and_shaken() -> None:
    """x − ε ∇ [7 Σ_g CE + 3 Σ_{g<h} (t_g − t_h)² + 5 TV] + .5 √(2ε) ζ; means over the two rows, classes and pixels."""
    linear = nn.Linear(3 * 4 * 4, 5)
    stage = Scene(
        Frame((3, 4, 4), torch.full((3, 1, 1), -1.0), torch.ones(3, 1, 1)),
        5,
        Teacher(lambda images: linear(images.flatten(1))),
        linear,
        lambda images: images,
        (),
    )
    config = cake.Config(pictures=6, groups=3, iterations=1, classify=7.0, attract=3.0, tv=5.0, noise=0.5)
    torch.manual_seed(1)
    made = cake.pictures(config, stage, 0.25)[PIXELS]
    torch.manual_seed(1)
    classes = [torch.randperm(5)[:3].tolist() for _ in range(2)]
    x = torch.randn(6, 3, 4, 4).requires_grad_()
    told = linear(x.flatten(1)).log_softmax(-1).view(2, 3, 5)
    loss = -7 * sum(told[row, g, c] for row in range(2) for g, c in enumerate(classes[row])) / 2
    logits = linear(x.flatten(1)).view(2, 3, 5)
    for g, h in itertools.combinations(range(3), 2):
        loss = loss + 3 * (logits[:, g] - logits[:, h]).square().mean()
    down, across = x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]
    loss = loss + 5 * (down.abs().mean() + across.abs().mean())
    (slope,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(made, (x - 0.25 * slope + 0.5 * 0.5**0.5 * torch.randn(x.shape)).detach())


def test_every_picture_asked_is_counted(tmp_path: Path) -> None:
    model = load(tiny.vit(tmp_path / "big"))
    config = cake.Config(**SMALL)
    stage = scene(config, model, model, LocalRun(0, tmp_path / "run"))
    rows = cake.pictures(config, stage, 0.1)
    assert len(rows[PIXELS]) == 8 and stage.asked.queries == 8 * (2 + 1)


@pytest.mark.slow
def test_a_student_learns_the_zoos_digits_from_pictures_of_nothing(tmp_path: Path) -> None:
    """A one-block student with new weights, of the zoo's ViT; 1 200 pictures, none of them real."""
    from lfm import zoo
    from lfm.zoo import vision

    teacher = load(zoo.model("vit"))
    config = cake.Config(steps=600, every=30, iterations=40, pictures=60, lr=3e-3, layers=1, start="random")
    inputs = check("distill.cake", cake.METHOD, Inputs({"teacher": (teacher,), "student": (teacher,)}, {}))
    made = cake.run(config, inputs, LocalRun(0, tmp_path))
    assert isinstance(made, Model)
    records = vision.images("identity", "test")
    batch = task_for(records, teacher.ask(Codec), teacher.facts).collate(records)
    with torch.no_grad():
        right = (forward(made.ask(Gradients).module(), batch).argmax(-1) == batch["labels"]).double().mean()
    print(f"right {right:.4f}")
    assert right > 0.2
