"""Train a student on pictures that a generator makes for it, with no data at all.

    L_G = oh · CE(t, y) + adv · (−KL(t ‖ s)) + bn · R + bal · Σ p̄ log p̄ − act · |f|  (+ contrast · L_C),
    L_S = T² KL(t_T ‖ s_T) on what the generator makes

Paper: Data-free learning of student networks, arXiv 1904.01186 (`dafl`); Zero-shot knowledge transfer via adversarial
belief matching, 1905.09768 (`zskt`); Data-free network quantization with adversarial knowledge distillation, 2005.04136
(`dfq`); Contrastive model inversion, 2105.08584 (`cmi`); Up to 100× faster data-free knowledge distillation, 2112.06253
(`fast`). A kind is its weights, and how its generator is trained: `dafl`, `zskt` and `dfq` train one generator between
the student's steps, and the student sees each picture once. `cmi` trains a new generator and its z for each batch, and
keeps the best in a bank; `fast` does so in a few steps, from a generator whose beginning is learned from all batches'
steps (first-order MAML). Weights that are null are the kind's, as in the papers' shared code (zju-vipa/Fast-Datafree).

Differs: pictures are moved and mirrored in `cmi` and `fast` only as `jitter` and `flip` say (there: 4 pixels of 32, and
half of them), a batch at a time; R has no momentum over batches (there .9 in `fast`, whose first layer is also drawn
anew once); `cmi` and `fast` make a batch each 50 and 20 of the student's steps (there: 400), since runs are shorter.
R is 0 where a teacher has no batch norm, and that tells: in 2,000 steps (seed 0, benchmarks/data_free.py) `fast` gave a
student .944 of test digits from a teacher with batch norms and .581 from a ViT, `zskt` .608 and .806; 300 real images
and the teacher's answers give .983 and .933 in as many steps. Nothing here replaces data that there is.

Models: teacher (Gradients), student (Gradients), each with Codec or with `image`, `mean` and `std`; both tell the same
classes. Data: none. What the teacher is asked is counted (`queries`). Errors: MismatchError and ConfigError before any
weight is read; DivergedError.

    lfm run distill.generative teacher=big student=small --set kind=fast --set steps=15 --out taught
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec

from lfm.core import Codec, Cost, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import ConfigError
from lfm.core.heavy import nn, torch
from lfm.distilling import datafree, generator
from lfm.distilling.contrasting import VIEWS, Contrast, contrasting
from lfm.distilling.datafree import PIXELS, DataFree, Scene
from lfm.distilling.generator import MOMENTS, Pace, Terms
from lfm.distilling.pictures import jittered
from lfm.distilling.telling import TOLD
from lfm.train import state_of
from lfm.train.state import State

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch
    from lfm.distilling.bank import Bank


class Kind(NamedTuple):
    """pace: of a round. every: the student's steps between rounds."""

    terms: Terms
    pace: Pace
    every: int
    contrast: float = 0.0


KINDS: Mapping[str, Kind] = {
    "dafl": Kind(Terms(oh=1, bal=20, act=1e-3), Pace(1), 5),
    "zskt": Kind(Terms(adv=1), Pace(1), 5),
    "dfq": Kind(Terms(adv=1, bn=1, oh=1, bal=20), Pace(1), 10),
    "cmi": Kind(Terms(adv=0.5, bn=1, oh=1), Pace(200), 50, contrast=0.8),
    "fast": Kind(Terms(adv=1.33, bn=10, oh=0.5), Pace(5, 3e-3, 1e-2), 20),
}
KEPT = ("cmi", "fast")
"""Kinds whose pictures are kept in the bank; of the others the student sees each once."""
Weight = Annotated[float, Meta(ge=0)] | None


class Config(DataFree, frozen=True):
    kind: Annotated[Literal["dafl", "zskt", "dfq", "cmi", "fast"], Meta(description="how pictures are made")] = "fast"
    adv: Annotated[Weight, Meta(description="weight of the student's disagreement; null: the kind's")] = None
    bn: Annotated[Weight, Meta(description="weight of the teacher's statistics; null: the kind's")] = None
    oh: Annotated[Weight, Meta(description="weight of the teacher being sure; null: the kind's")] = None
    bal: Annotated[Weight, Meta(description="weight of classes being as frequent; null: the kind's")] = None
    act: Annotated[Weight, Meta(description="weight of the last layer's input being large; null: the kind's")] = None
    contrast: Annotated[Weight, Meta(description="weight of pictures being unlike; null: the kind's")] = None
    rounds: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="a generator's steps a round; null: the kind's")
    ] = None
    every: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="the student's steps between rounds; null: the kind's")
    ] = None
    generator_lr: Annotated[
        Annotated[float, Meta(gt=0)] | None, Meta(description="rate of the generator (Adam); null: the kind's")
    ] = None
    bank: Annotated[int, Meta(ge=1, description="pictures kept at most, of cmi and fast; the oldest give way")] = 4096
    before: Annotated[int, Meta(ge=0, description="rounds before the student's first step, of cmi and fast")] = 10
    latent: Annotated[int, Meta(ge=1, description="numbers that a picture is made from")] = 256
    width: Annotated[int, Meta(ge=1, description="channels of the generator's last layer; half of the others'")] = 64
    jitter: Annotated[float, Meta(ge=0, lt=1, description="share of the sides that cmi and fast move pictures by")] = (
        0.0
    )
    flip: Annotated[bool, Meta(description="whether cmi and fast mirror half of the pictures")] = False
    nearness: Annotated[float, Meta(gt=0, description="temperature of cmi's contrast")] = 0.2


Made = tuple[Callable[[int, "Bank"], "Batch | None"], Mapping[str, State]]
"""What makes pictures, and what it changes beside the student."""


def settled(config: Config) -> Kind:
    """The kind with the numbers that the settings give in place of its own."""
    kind = KINDS[config.kind]

    def given(name: str, own: float) -> float:
        value = getattr(config, name)
        return own if value is None else value

    lr = config.generator_lr or kind.pace.lr
    return Kind(
        Terms(*(given(name, own) for name, own in kind.terms._asdict().items())),
        Pace(config.rounds or kind.pace.steps, lr, kind.pace.lr_z * lr / kind.pace.lr),
        config.every or kind.every,
        given("contrast", kind.contrast),
    )


def drawn(config: Config, scene: Scene) -> Tensor:
    return torch.randn(config.batch_size, config.latent).to(scene.frame.low.device)


def trained(config: Config, kind: Kind, scene: Scene, run: Run, stack: ExitStack) -> Made:
    """One generator, trained a little every so often; what it makes is used once."""
    judged = stack.enter_context(generator.judge(scene, kind.terms))
    seed = run.seed_for("generator")
    net = generator.going(scene, judged, kind.pace.lr, config.batch_size, config.latent, config.width, seed)

    def synthesise(step: int, bank: Bank) -> Batch:
        for _ in range(kind.pace.steps if step % kind.every == 0 else 0):
            net.stepped()
        with torch.no_grad():
            return {PIXELS: net.made()}

    return synthesise, {"generator": net.state}


def inverted(config: Config, kind: Kind, scene: Scene, run: Run, stack: ExitStack) -> Made:
    """A generator and its z for each batch: a new one, or one that begins where all have helped it to."""
    judged = stack.enter_context(generator.judge(scene, kind.terms, agreed=True))
    kept: dict[str, State] = {}
    shared: nn.Sequential | None = None
    meta: torch.optim.Adam | None = None
    if config.kind == "fast":
        shared = generator.new(scene, config.latent, config.width, run.seed_for("generator"))
        meta = torch.optim.Adam(shared.parameters(), lr=kind.pace.lr * kind.pace.steps, betas=MOMENTS)
        kept["generator"] = state_of(shared, "", meta)
    unlike: Contrast | None = None
    if kind.contrast:
        unlike = stack.enter_context(contrasting(scene, kind.pace.lr, config.nearness, config.flip, run))
        kept["head"] = unlike.state

    def round(bank: Bank, adversarial: bool) -> Batch:
        if shared is None:
            net = generator.new(scene, config.latent, config.width, int(torch.randint(2**62, ())))
        else:
            net = copy.deepcopy(shared)
        classes = torch.randint(scene.classes, (config.batch_size,)).to(scene.frame.low.device)
        z = drawn(config, scene).requires_grad_()

        def loss(images: Tensor) -> tuple[Tensor, Batch]:
            total = judged(jittered(images, config.jitter, config.flip), classes, adversarial)
            if unlike is None:
                return total, {PIXELS: images.detach()}
            apart, views = unlike.apart(images, bank)
            return total + kind.contrast * apart, {PIXELS: images.detach(), VIEWS: views}

        beside = [unlike.optimizer] if unlike else []
        found, sums = generator.found(lambda: scene.frame.scaled(net(z)), loss, net, z, kind.pace, beside)
        if shared is not None and meta is not None:
            for parameter, total in zip(shared.parameters(), sums):
                parameter.grad = total
            meta.step()
        if config.jitter or config.flip:
            return found
        with torch.no_grad():  # asked once, since the student sees it as it is
            return {**found, TOLD: scene.asked(found[PIXELS])}

    def synthesise(step: int, bank: Bank) -> Batch | None:
        for _ in range(config.before if step == 0 else 0):
            bank.add(round(bank, False))
        return round(bank, True) if step % kind.every == 0 else None

    return synthesise, kept


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    kind = settled(config)
    gradients = inputs.model("student").ask(Gradients)
    scene = datafree.scene(config, inputs.model("teacher"), inputs.model("student"), run)
    kept = config.kind in KEPT

    def loss(rows: Batch) -> Tensor:
        if kept and (config.jitter or config.flip):
            rows = {PIXELS: jittered(rows[PIXELS], config.jitter, config.flip)}
        return datafree.response(scene, rows, config)

    with ExitStack() as stack:
        synthesise, beside = (inverted if kept else trained)(config, kind, scene, run, stack)
        datafree.distil(scene, synthesise, roomy(config), run, loss=loss, beside=beside)
    return gradients.rewrap(scene.student)


def roomy(config: Config) -> Config:
    """The settings with a bank of no more than a batch where pictures are seen once."""
    return config if config.kind in KEPT else msgspec.structs.replace(config, bank=config.batch_size)


def agree(config: Config, inputs: Inputs) -> None:
    datafree.agree(roomy(config), inputs.model("teacher"), inputs.model("student"))
    if config.kind not in KEPT:
        datafree.unread(config, ("jitter", "flip", "nearness"), f"{config.kind} keeps no pictures")
    if config.contrast and config.kind not in KEPT:
        raise ConfigError(f"{config.kind} keeps no pictures to hold new ones against", fix="contrast of cmi or fast")


def cost(config: Config, sizes: Sizes) -> Cost:
    kind = settled(config)
    kept, views = config.kind in KEPT, 2 if kind.contrast else 1
    made = (math.ceil(config.steps / kind.every) + config.before * kept) * config.batch_size
    asked = made if kept and not (config.jitter or config.flip) else None  # what is not moved is asked once
    teacher, student = sizes.model("teacher"), sizes.model("student")
    return datafree.costs(config, teacher, student, made, kind.pace.steps * views, asked)


METHOD = Method(
    paper="arXiv:2112.06253",
    config=Config,
    models={
        "teacher": Slot((Gradients,), also=(Codec,), help="the classifier of images whose answers are learned"),
        "student": Slot((Gradients,), also=(Codec,), help="the classifier that learns them"),
    },
    run=run,
    cost=cost,
    agree=agree,
)
