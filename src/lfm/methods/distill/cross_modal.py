"""Train a student of one modality on what a teacher of another tells of the same things: no labels are needed.

    L = (1 − α) CE(y, p(x)) + α T² KL(pᵗ_T(x̃) ‖ p_T(x)),   x̃ and x two views of one thing: an image, a text, …

Paper: Cross modal distillation for supervision transfer, arXiv 1507.00448: a network for an unlabelled modality learns
from one for a labelled modality through pairs of the two. Differs: there the middle layer's features are copied, and a
head is trained on labels afterwards; here the answers are, as SoundNet does from images to sounds (1610.09001), so that
the student can do the task at once, and either may be any classifier.

Measured (docs/distilling.md): a small BERT that reads digits as letters, taught by a ViT that sees them and no label,
comes to .546; by 60 labels to .335, by labels for all 1200 to .619.

Models: teacher (Logits, Codec), student (Gradients, Codec): classifiers of texts, pairs, images or sounds, whose
classes have the same names in any order. Data: `seen`, what the teacher reads, and `train`, what the student reads of
the same things: as many records, in the same order. Classes are read from `train` alone, and with alpha=1 may be empty.
The teacher is asked once a record. Errors: MismatchError where classes differ; DataError where one cannot read its
records, there are not as many of both, or a class is empty and alpha < 1; DivergedError.

    lfm run distill.cross_modal teacher=sees student=reads seen=images.jsonl train=texts.jsonl --out taught
"""

from __future__ import annotations

from typing import Annotated

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Logits, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import DataError, MismatchError
from lfm.data import task as tasks
from lfm.data.shares import classless
from lfm.data.suited import fitting, worded
from lfm.distilling import answering, classes
from lfm.distilling import lesson as lessons
from lfm.distilling.student import Taught, formed, smaller
from lfm.distilling.together import paired
from lfm.train import fit, training

KINDS = ("label", "pair", "image", "audio")


class Config(Taught, frozen=True):
    temperature: Annotated[float, Meta(gt=0, description="T, of both models' answers")] = 2.0
    alpha: Annotated[float, Meta(ge=0, le=1, description="weight of the teacher's answers against the labels'")] = 1.0


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    teacher, student = inputs.model("teacher"), inputs.model("student")
    records = classless(inputs.records("train"), student)
    lesson = paired(records, inputs.records("seen"), teacher, student)
    gradients = student.ask(Gradients)
    module = formed(gradients.module(), config, run, lesson=lesson)
    loss, collate = answering.answered(config, lesson, teacher, module, run)
    losses = fit(module, lesson.numbers, collate, loss, config, run)
    run.note(loss_before=losses[0], loss_after=losses[-1])
    return gradients.rewrap(module)


def agree(config: Config, inputs: Inputs) -> None:
    teacher, student = inputs.model("teacher"), inputs.model("student")
    seen, read = inputs.records("seen"), inputs.records("train")
    for model in (teacher, student):
        if not model.facts.task.endswith("-classification"):
            raise MismatchError(
                f"{model.ref} is {model.facts.task or 'of no known task'}, and no classifier",
                why="what a model of one modality tells another is probabilities of classes that both have",
                fix="distill.response teaches language models",
            )
    worded(seen)
    tasks.suits(seen, teacher.facts)
    fitting(seen, teacher, teacher.facts._replace(labels=()))  # classes are read of the student's records alone
    lessons.readable(Inputs({"student": (student,)}, {"train": read}), learned=config.alpha < 1)
    classes.same(teacher.facts.labels, student.facts.labels)
    if len(seen) != len(read):
        raise DataError(
            f"{len(seen)} records for the teacher (seen), {len(read)} for the student (train)",
            why="each record of one is paired with the record of the other in the same place",
            fix="give both views of the same things, in the same order",
        )


def cost(config: Config, sizes: Sizes) -> Cost:
    teacher, student = sizes.model("teacher"), sizes.model("student")
    whole = training(config, smaller(config, student), sizes.data["train"])
    asked = 2.0 * teacher.parameters * sizes.data["seen"].tokens if config.alpha else 0.0
    return whole._replace(flops=whole.flops + asked, memory=whole.memory + 4 * teacher.parameters)


METHOD = Method(
    paper="arXiv:1507.00448",
    config=Config,
    models={
        "teacher": Slot((Logits, Codec), help="the classifier of one modality"),
        "student": Slot((Gradients, Codec), help="the classifier of another, which learns"),
    },
    data={
        "seen": DataSlot(Data.UNLABELED, KINDS, help="what the teacher reads"),
        "train": DataSlot(Data.UNLABELED, KINDS, help="what the student reads of the same things, in the same order"),
    },
    forms=("checkpoint",),
    run=run,
    cost=cost,
    agree=agree,
)
