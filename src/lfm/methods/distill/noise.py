"""Distil without data: noise is optimised into pictures that the teacher knows, and the student learns from them.

    x ← argmin CE(t(x), y) + a_tv TV(x) + a_l2 ‖x‖ + a_s R(x) + a_c (1 − JS(t(x), s(x)))

Paper: DeepInversion, arXiv 1912.08795, and Data-free knowledge distillation (Lopes et al.), arXiv 1710.07535.
kind=deepinversion: R is how far the means and variances of what the teacher's norms read are from those of its data;
the weights are the paper's on CIFAR-10. kind=adi: with competition, pictures on which the student differs from
the teacher. kind=lopes: in place of CE the mean squared distance from logits drawn from the records' normal of class y.

Where the data's means and variances come from (`statistics`): batch norms remember them. For a network without (a
transformer) whoever has the data may give them once, as `records` (lfm.distilling.statistics.recorded, write); else R
is zero, and pictures have priors alone. On the zoo's ViT (600 steps, 640 pictures, seeds 0 and 1) neither records (.53
and .28 of the digits right) nor dead leaves' statistics (.16) are shown to be better than none (.40, .40). Asked once
each, 6,400 pictures of plain noise gave .53 and .59: iterations=0, pictures=640. docs/distilling.md has the settings.

Differs: the picture's last state is kept, not its best; pictures stay between black and white from the beginning (the
authors' CIFAR code leaves them free, that for ImageNet does so); JS is of the two answers against their mean, where the
authors' code has the mean against the answers, and cuts probabilities at .01 and .99; records of layers are moments of
each channel, matched over a batch, where Lopes draws an activation for each picture; no ReLU is applied to logits
drawn.

Models: teacher (Gradients), student (Gradients), both classifiers of images into the same classes; their codecs tell
what pictures they read, or `image`, `mean` and `std` do. The student may be given by the teacher's reference, with
layers and start=random. Data: none. The teacher is asked `iterations` + 1 times a picture; `queries` is noted. Errors:
MismatchError, DataError and ConfigError before a weight is read; DivergedError.

    lfm run distill.noise teacher=big student=small --set steps=20 --set iterations=5 --out taught
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from lfm.core import Codec, Cost, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import ConfigError, MismatchError
from lfm.core.heavy import F, torch
from lfm.distilling import datafree, statistics
from lfm.distilling.datafree import PIXELS, DataFree, Scene
from lfm.distilling.pictures import descended, jittered, leaves, roughness
from lfm.distilling.telling import TOLD
from lfm.train import seeded
from lfm.train.losses import divergence

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from lfm.core.interfaces import Batch
    from lfm.distilling.bank import Bank
    from lfm.distilling.statistics import Records

COMPETE = 3.0
"""Temperature of the competition, as in the authors' code."""
LEAVES = 512
"""Procedural pictures that statistics are measured on."""


class Config(DataFree, frozen=True):
    kind: Annotated[
        Literal["deepinversion", "adi", "lopes"],
        Meta(description="pictures of the teacher's classes; that also divide it from the student; of drawn logits"),
    ] = "deepinversion"
    statistics: Annotated[
        Literal["norms", "leaves", "none"],
        Meta(description="R: against records or what batch norms remember; against dead leaves; none"),
    ] = "norms"
    records: Annotated[str, Meta(description="file of the teacher's activation records; needed by kind=lopes")] = ""
    every: Annotated[int, Meta(ge=1, description="student's steps between two batches of new pictures")] = 40
    pictures: Annotated[int, Meta(ge=1, description="new pictures a batch")] = 64
    begin: Annotated[
        Literal["noise", "leaves"], Meta(description="what pictures begin as: Gaussian noise, or dead leaves")
    ] = "noise"
    iterations: Annotated[int, Meta(ge=0, description="steps that make that into pictures of classes")] = 200
    picture_lr: Annotated[float, Meta(gt=0, description="of those steps (Adam), in normalised pixel values")] = 0.05
    tv: Annotated[float, Meta(ge=0, description="weight of total variation")] = 2.5e-5
    l2: Annotated[float, Meta(ge=0, description="weight of the pictures' norm")] = 3e-8
    match: Annotated[float, Meta(ge=0, description="weight of R")] = 10.0
    competition: Annotated[float, Meta(ge=0, description="weight of the competition, of kind=adi")] = 1.0
    jitter: Annotated[float, Meta(ge=0, lt=1, description="share of the sides that pictures are rolled by")] = 0.0625
    flip: Annotated[bool, Meta(description="mirror half of the batches while they are made")] = False


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    student = inputs.model("student")
    scene = datafree.scene(config, inputs.model("teacher"), student, run)
    assert scene.module is not None
    records = statistics.opened(config.records) if config.records else None
    if records is not None:
        _fits(records, scene.module, scene.classes, config.records)
    with seeded(run.seed_for("leaves")):
        unlike = prior(config, scene, scene.module, records)

    def synthesise(step: int, bank: Bank) -> Batch | None:
        return pictures(config, scene, unlike, records) if step % config.every == 0 else None

    datafree.distil(scene, synthesise, config, run)
    return student.ask(Gradients).rewrap(scene.student)


def pictures(
    config: Config,
    scene: Scene,
    unlike: Callable[[], AbstractContextManager[Callable[[], Tensor]]],
    records: Records | None,
) -> Batch:
    """One batch of pictures made from noise, and what the teacher tells of them. unlike: tells R of a forward."""
    place = scene.frame.low.device
    classes = (torch.randperm(config.pictures) % scene.classes).to(place)
    wanted = statistics.drawn(records, classes) if records is not None and config.kind == "lopes" else None

    def loss(images: Tensor) -> Tensor:
        moved = jittered(images, config.jitter, config.flip)
        told = scene.asked(moved)
        known = F.cross_entropy(told, classes) if wanted is None else F.mse_loss(told, wanted)
        known = known + config.tv * roughness(moved) + config.l2 * torch.linalg.vector_norm(moved)
        if config.kind == "adi":
            known = known + config.competition * (1 - between(scene.answer(moved), told))
        return known + config.match * far()

    start = leaves(scene.frame, config.pictures) if config.begin == "leaves" else scene.frame.noise(config.pictures)
    with unlike() as far:
        adam = partial(torch.optim.Adam, lr=config.picture_lr)
        made = descended(start, adam, loss, config.iterations, scene.frame.clamp)
    with torch.no_grad():
        return {PIXELS: made, TOLD: scene.asked(made)}


def between(student: Tensor, teacher: Tensor) -> Tensor:
    """Jensen–Shannon divergence of two models' answers at T = 3, mean over pictures, in nats."""
    return divergence(F.log_softmax(student / COMPETE, -1), F.log_softmax(teacher / COMPETE, -1), "jsd").mean()


def prior(
    config: Config, scene: Scene, module: nn.Module, records: Records | None
) -> Callable[[], AbstractContextManager[Callable[[], Tensor]]]:
    """R by the settings: what opens a context in which it is told after each forward."""
    if config.statistics == "none" or not config.match:
        return lambda: statistics.matched(module, {})
    if config.statistics == "leaves":
        shown = leaves(scene.frame, LEAVES)
        known = statistics.measured(module, [lambda: scene.asked(shown)], statistics.norms(module))
        return lambda: statistics.matched(module, known)
    place = scene.frame.low.device
    found = statistics.stored(module) if records is None else records.layers
    kept = {name: statistics.Moments(mean.to(place), var.to(place)) for name, (mean, var) in found.items()}
    return lambda: statistics.matched(module, kept)


def _fits(records: Records, module: nn.Module, classes: int, file: str) -> None:
    known = dict(module.named_modules())
    why = (
        "" if tuple(records.mean.shape) == (classes, classes) else f"it has {classes} classes, not {len(records.mean)}"
    )
    for name, (mean, _) in records.layers.items():
        if name not in known:
            why = f"the teacher has no layer {name}"
        elif (held := statistics.channels(known[name])) not in (0, len(mean)):
            why = f"the teacher's {name} has {held} channels, not {len(mean)}"
    if why:
        raise MismatchError(f"{file} holds the records of another model", why=why)


def cost(config: Config, sizes: Sizes) -> Cost:
    made = config.pictures * math.ceil(config.steps / config.every)
    asked = made + LEAVES * (config.statistics == "leaves" and config.match > 0)
    return datafree.costs(config, sizes.model("teacher"), sizes.model("student"), made, config.iterations, asked)


def agree(config: Config, inputs: Inputs) -> None:
    datafree.agree(config, inputs.model("teacher"), inputs.model("student"))
    if config.records:
        statistics.opened(config.records)
    elif config.kind == "lopes":
        raise ConfigError("kind=lopes makes pictures from records, and none were given", fix="records=FILE")


METHOD = Method(
    paper="arXiv:1912.08795",
    config=Config,
    models={
        "teacher": Slot((Gradients,), also=(Codec,), help="the classifier of images to learn from"),
        "student": Slot((Gradients,), also=(Codec,), help="the model that learns"),
    },
    run=run,
    cost=cost,
    agree=agree,
)
