"""Train a student on a teacher's softened answers.

    L = (1 − α) CE(y, p) + α T² D(pᵗ_T, p_T),   p_T = softmax(logits / T)

Paper: Distilling the knowledge in a neural network, arXiv 1503.02531. D is KL(teacher ‖ student) as there (`forward`),
KL(student ‖ teacher) (`reverse`, as in 2306.08543), or Jensen–Shannon (`jsd`, 2306.13649). Differs: language models too
are distilled, at every position that the task scores; and the student may begin as the teacher's own architecture with
fewer blocks (give one reference for both roles, and `layers`). Of language models neither's logits are ever whole where
they are a linear function of hidden states: docs/distilling.md, "What it costs".

T is 4 of classes and 1 of words where it is not set: in one short trial (2 of the 5 blocks of a 0.26 M story model, 150
steps, seed 0) the loss on other stories was 2.59 by labels alone, 2.61 with T = 1, 2.80 with T = 4.

Models: teacher (Logits and Codec; or answers kept by `lfm distill cache`; or classes; or, by an endpoint, its likeliest
tokens: one query a place, paid once), student (Gradients, Codec). Of the k likeliest alone T = 1 is exact over k + 1
outcomes; else what they leave is spread evenly. Two language models must share kind and vocabulary; two classifiers the
names of their classes, in any order; each then reads the records its own way. Data: every kind; with alpha=1 the
classes of records may be empty, with alpha=0 nobody is asked. A classifying teacher is asked once a record; its answers
(N, classes) are kept, up to 256 MB. Errors: MismatchError, and DataError naming a record that is blank, or of no class
where alpha < 1, before any weight is read; DivergedError.

    lfm run distill.response teacher=big student=small train=texts.jsonl --out taught
"""

from __future__ import annotations

from typing import Annotated

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot
from lfm.data.shares import classless
from lfm.distilling import answering
from lfm.distilling import lesson as lessons
from lfm.distilling.answering import Answering
from lfm.distilling.answers import ACCESS, queries
from lfm.distilling.student import formed, smaller
from lfm.train import fit, training
from lfm.train.losses import Divergence


class Config(Answering, frozen=True):
    divergence: Annotated[Divergence, Meta(description="forward, reverse, or jsd between the two answers")] = "forward"


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    teacher, student = inputs.model("teacher"), inputs.model("student")
    records = classless(inputs.records("train"), student)
    lesson = lessons.lesson(records, teacher, student)
    gradients = student.ask(Gradients)
    module = formed(gradients.module(), config, run, lesson=lesson)

    loss, collate = answering.answered(config, lesson, teacher, module, run, config.divergence)
    losses = fit(module, lesson.numbers, collate, loss, config, run)
    run.note(loss_before=losses[0], loss_after=losses[-1])
    return gradients.rewrap(module)


def agree(config: Config, inputs: Inputs) -> None:
    lessons.agree(inputs.model("teacher"), inputs.model("student"))
    lessons.readable(inputs, learned=config.alpha < 1)


def cost(config: Config, sizes: Sizes) -> Cost:
    teacher, student = sizes.model("teacher"), sizes.model("student")
    # logits are made a few places at a time, of teacher and student
    forwards = teacher.parameters if config.alpha else 0
    whole = training(config, smaller(config, student), sizes.data["train"], forwards=forwards, logits=0)
    asked = queries(sizes) if config.alpha else (0, 0)
    return whole._replace(memory=whole.memory + 4 * student.parameters, queries=asked[0], tokens=asked[1])


METHOD = Method(
    paper="arXiv:1503.02531",
    config=Config,
    models={
        "teacher": Slot((), any_of=ACCESS, also=(Codec,), help="the model whose answers are learned, or its answers"),
        "student": Slot((Gradients, Codec), help="the model that learns them"),
    },
    data={
        "train": DataSlot(
            Data.UNLABELED,
            ("text", "completion", "label", "pair", "image", "fact"),
            help="what the teacher is asked; text and classless records will do",
        )
    },
    run=run,
    cost=cost,
    agree=agree,
)
