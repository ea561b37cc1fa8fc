"""The one loop of distillation without data: pictures are made, kept, and learned from.

    step s:  what `synthesise` makes goes into the bank;  θ ← θ − η ∇ L(θ; pictures drawn from the bank)

A method says how pictures are made (noise that is optimised, a generator that is trained, …); the student's steps, the
bank, the count of what the teacher is asked and the checkpoints are here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, final

import msgspec

import lfm.core
from lfm.core import Codec, Cost, Gradients, Logits, Meta, Model, Run
from lfm.core.errors import ConfigError, MismatchError
from lfm.core.heavy import nn, torch
from lfm.core.interfaces import Classes
from lfm.distilling import classes as named
from lfm.distilling.bank import Bank
from lfm.distilling.pictures import Frame, frame_of, same, seen
from lfm.distilling.student import Taught, formed, smaller
from lfm.distilling.telling import TOLD, gap
from lfm.models import device, forward
from lfm.train import Fit, fingerprint, loop, state_of
from lfm.train.losses import Divergence
from lfm.train.setting import rate
from lfm.train.state import State, more

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch
    from lfm.core.model import Facts

PIXELS = "pixel_values"


class DataFree(lfm.core.Config, frozen=True):
    """Settings of a student that learns from pictures made for it."""

    steps: Annotated[int, Meta(ge=1, description="the student's steps")] = 2000
    batch_size: Annotated[int, Meta(ge=1, description="pictures a step")] = 64
    optimizer: Annotated[
        Literal["adamw", "sgd"], Meta(description="the student's; sgd has momentum .9, and wants lr .1 or so")
    ] = "adamw"
    lr: Annotated[float, Meta(gt=0, description="the student's peak learning rate")] = 1e-3
    weight_decay: Annotated[float, Meta(ge=0, description="the student's, of matrices only")] = 1e-4
    warmup: Annotated[float, Meta(ge=0, lt=1, description="share of the steps in which the rate rises")] = 0.05
    schedule: Annotated[Literal["cosine", "linear", "constant"], Meta(description="how the rate falls")] = "cosine"
    clip: Annotated[float, Meta(ge=0, description="largest norm of the student's gradient; 0: any")] = 1.0
    temperature: Annotated[float, Meta(gt=0, description="T, of both models' answers")] = 4.0
    divergence: Annotated[Divergence, Meta(description="forward, reverse, or jsd between the answers")] = "forward"
    bank: Annotated[int, Meta(ge=1, description="pictures kept at most; the oldest give way")] = 4096
    layers: Annotated[int, Meta(ge=0, description="blocks of the student to keep, evenly spaced; 0: all")] = 0
    start: Annotated[
        Literal["weights", "random"], Meta(description="whether the student begins with its weights or new ones")
    ] = "weights"
    image: Annotated[
        tuple[int, ...], Meta(description="channels, height, width, where a model has no image processor")
    ] = ()
    mean: Annotated[tuple[float, ...], Meta(description="of the teacher's input channels, with `image`")] = ()
    std: Annotated[tuple[float, ...], Meta(description="of the teacher's input channels, with `image`")] = ()
    checkpoint_every: Annotated[float, Meta(ge=0, description="seconds between checkpoints")] = 60.0


@final
class Teacher:
    """Pictures (B, C, H, W) → what it tells of them (B, classes), by a function; it counts the pictures it is asked."""

    def __init__(self, tell: Callable[[Tensor], Tensor]) -> None:
        self.tell, self.queries = tell, 0

    def __call__(self, images: Tensor) -> Tensor:
        self.queries += len(images)
        return self.tell(images)


@final
@dataclass(frozen=True)
class Scene:
    """Who teaches whom, in which space. frame: of the pictures made, the teacher's. student: its module, on the device;
    `answer` is its forward. view: pictures as it reads them. order: its classes, by number, in the teacher's order.
    asked: the teacher. module: the teacher's network, frozen and in eval mode, where it gives gradients."""

    frame: Frame
    classes: int
    asked: Teacher
    student: nn.Module
    view: Callable[[Tensor], Tensor]
    order: Sequence[int]
    module: nn.Module | None = None

    def answer(self, images: Tensor, student: Callable[[Batch], Tensor] | None = None) -> Tensor:
        """The student's logits (B, classes) in the teacher's order of classes, of pictures in the teacher's frame.

        student: what answers a batch in its place (its weights functionally replaced, a copy of it).
        """
        batch = {PIXELS: self.view(images)}
        told = student(batch) if student else forward(self.student, batch)
        return told[:, list(self.order)] if self.order else told


def scene(config: DataFree, teacher: Model, student: Model, run: Run, tell: Teacher | None = None) -> Scene:
    """The models on the device. tell: how a teacher without gradients is asked. ConfigError, ModelError."""
    place = device()
    frame = frame_of(_seeing(config, teacher, student), config.image, config.mean, config.std).to(place)
    theirs = frame_of(student, config.image, config.mean, config.std).to(place)
    module = None
    if tell is None:
        module = teacher.ask(Gradients).module().to(place).eval().requires_grad_(False)
        tell = Teacher(lambda images, known=module: forward(known, {PIXELS: images}))
    learner = formed(student.ask(Gradients).module(), _shape(config), run).to(place)
    labels = labels_of(teacher)
    order = [student.facts.labels.index(name) for name in labels] if labels and student.facts.labels else []
    own = _width(student, learner, theirs)
    classes = (len(labels) or own) if module is None else _width(teacher, module, frame)
    if classes != own:
        raise MismatchError(
            "teacher and student have different classes",
            why=f"the teacher tells {classes} of them, the student {own}",
            fix="give a student with the teacher's classes",
        )
    return Scene(
        frame,
        classes,
        tell,
        learner,
        (lambda images: images) if same(frame, theirs) else lambda images: seen(images, frame, theirs),
        () if order == list(range(len(order))) else order,
        module,
    )


def labels_of(teacher: Model) -> tuple[str, ...]:
    """The classes that a teacher tells, by name; empty where they have none."""
    return teacher.ask(Classes).labels if names(teacher) else teacher.facts.labels


def names(teacher: Model) -> bool:
    """Whether it is asked about pictures themselves and names their classes: it reads no batch."""
    return teacher.can(Classes) and not (teacher.can(Logits) or teacher.can(Gradients))


def _seeing(config: DataFree, teacher: Model, student: Model) -> Model:
    """Whose pictures are made: the teacher's; of one that takes any picture and says no size, the student's."""
    return student if names(teacher) and not (teacher.can(Codec) or config.image) else teacher


def _width(model: Model, module: nn.Module, frame: Frame) -> int:
    """How many classes it tells of a grey picture. ConfigError where it does not read pictures of that size."""
    grey = frame.scaled(torch.full((1, *frame.shape), 0.5).to(frame.low))
    try:
        with torch.no_grad():
            return forward(module.eval(), {PIXELS: grey}).shape[-1]
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{model.ref} does not read pictures of {list(frame.shape)} (channels, height, width)",
            why=str(error).splitlines()[0],
            fix="image=[3,32,32], or as it reads them; of each of the channels a mean and a std, or none",
        ) from None


def distil(
    scene: Scene,
    synthesise: Callable[[int, Bank], Batch | None],
    config: DataFree,
    run: Run,
    *,
    loss: Callable[[Batch], Tensor] | None = None,
    beside: Mapping[str, State] | None = None,
    even: str = "",
    name: str = "distil",
) -> tuple[float, ...]:
    """Train the scene's student in place on what is made for it; each step's loss. Notes the teacher's queries.

    synthesise: (step, bank) → rows for the bank, or None; asked before each of the student's steps, with the student
    frozen in eval mode. Rows are pixel_values (n, C, H, W) in the scene's frame, and what the loss reads beside them:
    with the teacher's answers there (telling.TOLD), it is not asked again. Drawn are `batch_size` rows a step, so that
    a bank of that size gives the newest alone. loss: rows → a scalar to descend; T² D of the two models' answers where
    none is given. beside: what else changes (a generator and its moments: lfm.train.state_of), by name; it is kept with
    the student, so that a killed run ends in the same bytes. even: as in Bank.draw. What is drawn comes from torch's
    own generators, which are seeded by step. DivergedError as in lfm.train.loop.
    """
    student = scene.student
    trained = [p for p in student.parameters() if p.requires_grad]
    assert trained, "no parameter of the student requires a gradient"
    optimizer = optimizer_of(student, config)
    pace = Fit(lr=config.lr, warmup=config.warmup, schedule=config.schedule)
    bank = Bank(config.bank, scene.frame.low.device)
    taught = loss or (lambda rows: response(scene, rows, config))

    def advance(step: int) -> Tensor:
        with frozen(student):
            made = synthesise(step, bank)
        if made is not None:
            bank.add(made)
        assert len(bank), "nothing was made for the first step"
        for group in optimizer.param_groups:
            group["lr"] = rate(pace, step, config.steps)
        optimizer.zero_grad(set_to_none=True)
        value = taught(bank.draw(config.batch_size, even))
        value.backward()
        total = value.detach()
        if config.clip:
            # ×0 carries an infinite or undefined norm into the loss, where it is noticed
            total = total + 0 * nn.utils.clip_grad_norm_(trained, config.clip)
        optimizer.step()
        return total

    def queries() -> dict[str, Tensor]:
        return {"asked": torch.tensor(scene.asked.queries)}

    def counted(tensors: Mapping[str, Tensor]) -> None:
        scene.asked.queries = int(tensors.get("asked", torch.tensor(scene.asked.queries)))

    start = fingerprint(student, msgspec.structs.replace(config, checkpoint_every=0.0))
    state = more(state_of(student, start, optimizer), "bank", bank.aids, bank.load)
    state = more(state, "queries", dict, counted, queries)
    for key, other in (beside or {}).items():
        state = more(state, key, lambda other=other: other.result() | other.aids(), other.load)
    student.train()
    try:
        losses = loop(
            advance,
            config.steps,
            state,
            run,
            name=name,
            every=config.checkpoint_every,
            remedy=lambda step: (
                f"lr={config.lr / 10:.0e} (the rate at that step was {rate(pace, step, config.steps):.1e})"
            ),
        )
    finally:
        optimizer.zero_grad(set_to_none=True)
        student.eval()
    run.note(queries=scene.asked.queries, loss_before=losses[0], loss_after=losses[-1])
    return losses


def response(scene: Scene, rows: Batch, config: DataFree) -> Tensor:
    """T² · D between the teacher's answers, which are asked for where the rows do not have them, and the student's."""
    images = rows[PIXELS]
    if TOLD not in rows:
        with torch.no_grad():
            rows = {**rows, TOLD: scene.asked(images)}
    return gap(scene.answer(images), rows, config.temperature, config.divergence)


def optimizer_of(module: nn.Module, config: DataFree) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov's momentum; vectors (biases, norms' gains) are not decayed."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=config.lr)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in eval mode and asks for no gradients of its weights; inputs still have theirs."""
    mode, trained = module.training, [p for p in module.parameters() if p.requires_grad]
    module.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        module.train(mode)


def unread(config: DataFree, names: Sequence[str], why: str) -> None:
    """ConfigError where one of these settings, which nothing reads here, is another than by default."""
    usual = type(config)()
    for name in names:
        if getattr(config, name) != getattr(usual, name):
            raise ConfigError(f"{name} changes nothing here", why=why, fix=f"leave {name} out")


def agree(config: DataFree, teacher: Model, student: Model) -> None:
    """That both classify images, into the same classes, and that their pictures' size is known. Reads no weight."""
    if len(config.image) not in (0, 3) or min(config.image, default=1) < 1:
        raise ConfigError(
            f"image={list(config.image)} describes no pictures",
            why="it is their channels, height and width",
            fix="image=[3,32,32]",
        )
    if (config.mean or config.std) and teacher.can(Codec) and student.can(Codec):
        raise ConfigError(
            "mean and std would not be read",
            why="both models have an image processor, which knows its own",
            fix="leave them out",
        )
    for model in (teacher, student):
        if model.facts.task not in ("", "image-classification"):
            raise MismatchError(
                f"{model.ref} does not classify images",
                why=f"its task is {model.facts.task}",
                fix="give a model that does",
            )
        if not model.can(Codec) and _seeing(config, model, student) is model:
            frame_of(model, config.image, config.mean, config.std)
    t, s = labels_of(teacher), student.facts.labels
    if t and s:
        named.same(t, s)
    if 0 < config.bank < config.batch_size:
        raise ConfigError(
            f"a bank of {config.bank} pictures gives no batch of {config.batch_size}", fix=f"bank={config.batch_size}"
        )


REUSE = 150
"""Multiplications a weight and picture: 197 of a ViT at 224 pixels, some 160 of ResNet-50, 147 of CIFAR ResNet-56."""


def costs(
    config: DataFree, teacher: Facts, student: Facts, made: float, passes: float, asked: float | None = None
) -> Cost:
    """Of `steps` student's steps, and of making so many pictures, each by so many passes forth and back.

    asked: pictures that the teacher is asked about beside those passes; None: all that the student learns from.
    """
    each = config.steps * config.batch_size
    told = each if asked is None else asked
    forth = 2 * REUSE * teacher.parameters
    shape = size_of(config, teacher, student)
    held = config.bank * math.prod(shape) if shape else 0
    return Cost(
        flops=each * 6 * REUSE * smaller(_shape(config), student).parameters + (told + made * passes * 2) * forth,
        steps=int(config.steps + made / config.batch_size * passes),
        memory=4 * (teacher.parameters + 4 * student.parameters + 2 * held),  # twice while the bank is checkpointed
        disk=12 * student.parameters,
        queries=int(told + made * passes),
    )


def size_of(config: DataFree, teacher: Facts, student: Facts) -> tuple[int, ...]:
    """(C, H, W) of the pictures that are made, as far as it is known before a model is read."""
    return config.image or teacher.image or student.image


def _shape(config: DataFree) -> Taught:
    return Taught(layers=config.layers, start=config.start)
