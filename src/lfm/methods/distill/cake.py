"""Distil without data: groups of pictures are drawn together towards the teacher's boundaries, and learned from.

    x_g ← x_g − ε ∇ [ 10³ Σ_g CE(t(x_g), y_g) + 10 Σ_{g<h} mean (t(x_g) − t(x_h))² + 10⁵ TV(x) ] (+ √(2ε) ζ)

Paper: Deep classifier mimicry without data access (CAKE), arXiv 2306.02090; weights, ε and its decay are those of the
authors' code. The classes y_g of a group are all different: each picture holds to its class while their logits attract
one another, so that they end on either side of the boundaries between. Nothing inside the teacher is looked at: no
batch norm is needed. ε begins at `picture_lr` and falls by as much after each batch of pictures, which after the last
makes `decades` powers of ten, so that boundaries are neared from far and from close by. The student learns the
teacher's own answers at T = 1.

Differs: the student learns while pictures are made, from those there are (there afterwards: 30 epochs of SGD over 256
batches of pictures). The noise ζ is left out unless `noise` asks for it, as in the code's own settings. On the zoo's
ViT (600 pictures of 40 iterations, one seed) it had .24 of the digits right, less than from noise made into classes
(.40; distill.noise).

Models: teacher (Gradients), student (Gradients), both classifiers of images into the same classes; their codecs tell
what pictures they read, or `image`, `mean` and `std` do. The student may be given by the teacher's reference, with
layers and start=random. Data: none. The teacher is asked `iterations` + 1 times a picture; `queries` is noted. Errors:
MismatchError and ConfigError before a weight is read; DivergedError.

    lfm run distill.cake teacher=big student=small --set steps=20 --set iterations=5 --out taught
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Annotated

from lfm.core import Codec, Cost, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.heavy import F, torch
from lfm.distilling import datafree
from lfm.distilling.datafree import PIXELS, DataFree, Scene
from lfm.distilling.pictures import descended, variation
from lfm.distilling.telling import TOLD

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch
    from lfm.distilling.bank import Bank


class Config(DataFree, frozen=True):
    temperature: Annotated[float, Meta(gt=0, description="T, of both models' answers")] = 1.0
    every: Annotated[int, Meta(ge=1, description="student's steps between two batches of new pictures")] = 40
    pictures: Annotated[int, Meta(ge=2, description="new pictures a batch, cut to whole groups")] = 100
    iterations: Annotated[int, Meta(ge=1, description="steps of SGD that move the pictures")] = 500
    groups: Annotated[int, Meta(ge=2, description="pictures that attract one another, each of its own class")] = 10
    picture_lr: Annotated[float, Meta(gt=0, description="ε of the first pictures")] = 0.1
    decades: Annotated[
        float, Meta(ge=0, description="powers of ten that ε falls by, the step after the last among them")
    ] = 4.0
    noise: Annotated[float, Meta(ge=0, description="Langevin noise, in units of √(2ε), after each of those steps")] = (
        0.0
    )
    classify: Annotated[float, Meta(ge=0, description="weight of each picture's class")] = 1e3
    attract: Annotated[float, Meta(ge=0, description="weight of the contrast between a group's logits")] = 10.0
    tv: Annotated[float, Meta(ge=0, description="weight of total variation")] = 1e5


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    student = inputs.model("student")
    scene = datafree.scene(config, inputs.model("teacher"), student, run)

    def synthesise(step: int, bank: Bank) -> Batch | None:
        return pictures(config, scene, pace(config, step)) if step % config.every == 0 else None

    datafree.distil(scene, synthesise, config, run)
    return student.ask(Gradients).rewrap(scene.student)


def pace(config: Config, step: int) -> float:
    """ε of the pictures made before this step of the student."""
    batches = math.ceil(config.steps / config.every)
    return config.picture_lr * 10 ** (-config.decades * (step // config.every) / batches)


def shape(config: Config, classes: int) -> tuple[int, int]:
    """Groups of pictures in a batch, and pictures in a group."""
    groups = min(config.groups, classes)
    return max(1, config.pictures // groups), groups


def pictures(config: Config, scene: Scene, epsilon: float) -> Batch:
    """One batch of groups drawn to the teacher's boundaries, and what it tells of them."""
    rows, groups = shape(config, scene.classes)
    place = scene.frame.low.device
    classes = torch.stack([torch.randperm(scene.classes)[:groups] for _ in range(rows)]).flatten().to(place)

    def loss(images: Tensor) -> Tensor:
        told = scene.asked(images)
        sure = config.classify * groups * F.cross_entropy(told, classes)
        return sure + config.attract * contrast(told.view(rows, groups, -1)) + config.tv * variation(images)

    def shaken(images: Tensor) -> Tensor:
        return images + config.noise * math.sqrt(2 * epsilon) * torch.randn(images.shape).to(place)

    start = torch.randn(rows * groups, *scene.frame.shape).to(place)
    made = descended(start, partial(torch.optim.SGD, lr=epsilon), loss, config.iterations, shaken)
    with torch.no_grad():
        return {PIXELS: made, TOLD: scene.asked(made)}


def contrast(told: Tensor) -> Tensor:
    """Σ over pairs of a row's groups of the mean squared difference of their logits (rows, groups, classes), a scalar.

    Mean over rows and classes; computed as groups × the spread around the row's mean, which is the same.
    """
    return told.shape[1] * (told - told.mean(1, keepdim=True)).square().sum(1).mean()


def cost(config: Config, sizes: Sizes) -> Cost:
    made = math.prod(shape(config, len(sizes.model("teacher").labels) or config.groups))
    made *= math.ceil(config.steps / config.every)
    return datafree.costs(config, sizes.model("teacher"), sizes.model("student"), made, config.iterations, made)


def agree(config: Config, inputs: Inputs) -> None:
    datafree.agree(config, inputs.model("teacher"), inputs.model("student"))


METHOD = Method(
    paper="arXiv:2306.02090",
    config=Config,
    models={
        "teacher": Slot((Gradients,), also=(Codec,), help="the classifier of images to learn from"),
        "student": Slot((Gradients,), also=(Codec,), help="the model that learns"),
    },
    run=run,
    cost=cost,
    agree=agree,
)
