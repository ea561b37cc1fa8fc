"""Train a small ViT in two stages: first what a masked autoencoder makes of images, then what its teacher answers.

    generic   L = smoothL1_2( D_s(E_s(x seen)), LN(h_t) ) at all patches, seen and hidden; a share `mask` is hidden
    specific  L = (1 − α) CE + α T² KL(pᵗ_T ‖ p_T)

Paper: Generic-to-specific distillation of masked autoencoders, arXiv 2302.14771 (CVPR 2023). D_s is a small decoder
beside the student, dropped after the first stage; LN has no gain, the mask is .75, smooth L1's β is 2, as in the
authors' code. With a model for `generic` (a masked autoencoder with its decoder, as ViTMAEForPreTraining) h_t is what
its decoder's fourth block writes when it sees the same patches, as in the paper. Differs: without one there is no
decoder to learn from, and h_t is the last block's output of the teacher itself, of the whole image: the student learns
to tell what the teacher sees where it is blind. The decoder's positions are learned; in the second stage both models
see the records once as they are (the authors augment, and learn from a distillation token).

On zoo:vit (four patches, and no autoencoder) the first stage did not pay: .907 after 250 + 250 steps, where
distill.response has .893 after 250 and .919 after 500 (docs/distilling.md).

Models: teacher (Features, Logits, Codec) and student (Gradients, Codec) classify images, by the same names; generic
(Gradients) reads images as the teacher does. All cut an image into equally many patches. Data: train, images with
classes (with alpha=1 without); images, for the first stage, else train. Errors: MismatchError where the patches are not
as many, or the models classify no images; ModelError where `generic` has no decoder.

    lfm run distill.g2sd teacher=big student=small train=images.jsonl --set generic_steps=100 --out taught
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from lfm.core import (
    Codec,
    Cost,
    Data,
    DataSlot,
    Features,
    Gradients,
    Inputs,
    Logits,
    Meta,
    Method,
    Model,
    Run,
    Sizes,
    Slot,
)
from lfm.core.errors import MismatchError, ModelError
from lfm.core.heavy import nn, torch
from lfm.data.shares import classless
from lfm.distilling import answering, inside, unmasking
from lfm.distilling import lesson as lessons
from lfm.distilling.answering import Answering
from lfm.distilling.student import formed, smaller
from lfm.models import device, forward, layers, structure
from lfm.train import fit, seeded, training

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch

PIXELS = "teacher.pixels"
DEPTH = 4
"""The student's decoder has so many blocks, and what so many of the autoencoder's write is learned."""


class Config(Answering, frozen=True):
    generic_steps: Annotated[int, Meta(ge=0, description="steps of the first stage; 0: as many as of the second")] = 0
    mask: Annotated[float, Meta(gt=0, lt=1, description="share of the patches that the student does not see")] = 0.75
    decoder: Annotated[int, Meta(ge=0, description="width of the student's decoder; 0: the student's")] = 0


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    teacher, student = inputs.model("teacher"), inputs.model("student")
    gradients = student.ask(Gradients)
    records = classless(inputs.records("train"), student)
    lesson = lessons.lesson(records, teacher, student)
    module = formed(gradients.module(), config, run, lesson=lesson)
    pictures = inputs.records("images")
    shown = lessons.lesson(classless(pictures, student), teacher, student) if pictures else lesson
    losses = _generic(config, inputs, shown, module, run)
    run.note(generic_before=losses[0], generic_after=losses[-1])

    loss, collate = answering.answered(config, lesson, teacher, module, run)
    losses = fit(module, lesson.numbers, collate, loss, config, run, name="specific")
    run.note(loss_before=losses[0], loss_after=losses[-1])
    return gradients.rewrap(module)


def _generic(config: Config, inputs: Inputs, lesson: lessons.Lesson, module: nn.Module, run: Run) -> tuple[float, ...]:
    """The first stage: trains the module in place; returns each step's loss."""
    last = structure.blocks(module)[-1]
    collate: Callable[[Sequence[int]], Batch]
    if inputs.all("generic"):
        theirs = _autoencoder(inputs.model("generic").ask(Gradients).module(), config.mask)

        def pictured(chosen: Sequence[int]) -> Batch:
            return {**lesson.collate(chosen), PIXELS: lesson.theirs(chosen)["pixel_values"]}

        collate = pictured

        def target(batch: Batch, noise: Tensor) -> Tensor:
            return theirs(batch[PIXELS], noise)
    else:
        teacher = inputs.model("teacher")
        collate = inside.shown(lesson, teacher, [("level", -1)], lesson.collate, run)

        def target(batch: Batch, noise: Tensor) -> Tensor:
            return inside.maps(batch)[0]

    first = {key: value.to(device()) for key, value in collate(lesson.numbers[:1]).items()}
    module.to(device())
    with torch.no_grad(), structure.watch(module, [("hidden", last)]) as seen:
        forward(module, first)
    mapped = inside.mapped(seen[0], 1)
    places = inside.patches(mapped.shape[1])
    beside, width = mapped.shape[1] - places, mapped.shape[2]
    told = target(first, torch.rand(1, places, generator=run.generator("first")).to(device()))
    if inside.patches(told.shape[1]) != places:
        raise MismatchError(
            f"the student sees {places} patches where its teacher sees {inside.patches(told.shape[1])}",
            fix="give a student with the teacher's patch size relative to its image",
        )
    with seeded(run.seed_for("decoder")):
        inner = config.decoder or width
        head = unmasking.decoder(width, told.shape[-1], places, beside, inner=inner, depth=DEPTH)
    whole = nn.ModuleDict({"student": module, "decoder": head})

    def loss(whole: Any, batch: Batch) -> Tensor:
        rows = len(next(iter(batch.values())))
        noise = torch.rand(rows, places).to(next(whole.parameters()).device)
        kept, where = unmasking.order(noise, config.mask)
        student = whole["student"]
        with unmasking.seeing(student, kept, beside), structure.watch(student, [("hidden", last)]) as seen:
            forward(student, batch)
        return unmasking.apart(whole["decoder"](seen[0], where), target(batch, noise), places)

    how = msgspec.structs.replace(config, steps=config.generic_steps or config.steps)
    return fit(whole, lesson.numbers, collate, loss, how, run, name="generic")


def _autoencoder(module: Any, mask: float) -> Any:
    """(pixels, noise) → what a masked autoencoder's decoder writes at its fourth block, of the same patches seen."""
    names = layers.all_blocks(module)
    lists = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in names))
    if len(lists) != 2 or not hasattr(module.config, "mask_ratio"):
        raise ModelError(
            f"{type(module).__name__} is no masked autoencoder with a decoder",
            why=f"it has {len(lists)} stacks of blocks, and its config tells {'a' if len(lists) == 2 else 'no'} mask",
            fix="leave generic out: what the teacher sees of whole images is learned then",
        )
    module.config.mask_ratio = mask
    decoding = [name for name in names if name.startswith(lists[1] + ".")]
    site = [("hidden", decoding[min(DEPTH, len(decoding)) - 1])]
    module.to(device()).eval().requires_grad_(False)

    def written(pixels: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad(), structure.watch(module, site) as seen:
            module(pixel_values=pixels, noise=noise)
        return seen[0]

    return written


def agree(config: Config, inputs: Inputs) -> None:
    teacher, student = inputs.model("teacher"), inputs.model("student")
    if student.facts.task != "image-classification":
        raise MismatchError(
            f"{student.ref} does not classify images",
            why=f"it is for {student.facts.task or 'no known task'}, and patches of images are hidden from it",
            fix="distill.feature learns what is inside of any teacher",
        )
    lessons.agree(teacher, student)
    for role in inputs.data:
        given = Inputs({"student": (student,)}, {role: inputs.records(role)})
        lessons.readable(given, learned=role == "train" and config.alpha < 1)


def cost(config: Config, sizes: Sizes) -> Cost:
    teacher, student = sizes.model("teacher"), sizes.model("student")
    made, amount = smaller(config, student), sizes.data["train"]
    second = training(config, made, amount, forwards=teacher.parameters if config.alpha else 0)
    how = msgspec.structs.replace(config, steps=config.generic_steps or config.steps)
    inner = config.decoder or made.width
    decoder = 12 * DEPTH * inner * inner  # it reads all patches, the student a few
    learning = made._replace(parameters=int(made.parameters * (1 - config.mask)) + decoder)
    generic = sum(facts.parameters for facts in sizes.models.get("generic", ()))
    first = training(how, learning, sizes.data.get("images", amount), forwards=generic or teacher.parameters)
    both = Cost(first.flops + second.flops, first.steps + second.steps, max(first.memory, second.memory))
    return both._replace(disk=max(first.disk, second.disk), memory=both.memory + 4 * (student.parameters + generic))


METHOD = Method(
    paper="arXiv:2302.14771",
    config=Config,
    models={
        "teacher": Slot((Features, Logits, Codec), help="the classifier of images whose answers are learned"),
        "student": Slot((Gradients, Codec), help="the ViT that learns them"),
        "generic": Slot((Gradients,), min=0, help="the masked autoencoder that the teacher began as, with its decoder"),
    },
    data={
        "train": DataSlot(Data.UNLABELED, ("image",), help="images with classes; with alpha=1 classless ones"),
        "images": DataSlot(Data.UNLABELED, ("image",), optional=True, help="images for the first stage; else train"),
    },
    run=run,
    cost=cost,
    agree=agree,
)
