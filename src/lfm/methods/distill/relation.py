"""Train a student in which records lie to one another as they do in its teacher.

    L = (1 − α) CE + α T² KL(pᵗ_T ‖ p_T) + β_D D + β_A A + β_S S
    D = mean over pairs of huber(‖s_i − s_j‖ / mean − ‖t_i − t_j‖ / mean)
    A = mean over triples of huber(cos ∠ s_i s_j s_k − cos ∠ t_i t_j t_k)
    S = ‖G_s − G_t‖²_F / B²,   G = x xᵀ, its rows of length one

Paper: Relational knowledge distillation, arXiv 1904.05068 (D and A, with 25 and 50); similarity-preserving 1907.09682
(S; its authors' weight is 3000). Differs: s and t are the mean over the positions of a block's output, at `places`
blocks or stages of equal shares of depth (the papers take the last feature map or embedding), which serves models of
any kind; of language models a record is its mean too. Only what lies in one batch is related: with `accumulate` pairs
are those of each part, and a last batch of one or two has none. Widths may differ, and nothing is learned beside.

On zoo:vit's digits it was .895, answers alone .893 and labels alone .872, with about .02 between seeds.

Models: teacher (Features, Codec; Logits unless alpha=0; Gradients tells how deep a convolutional one is), student
(Gradients, Codec). Two language models must share kind and vocabulary, two classifiers the names of their classes.
Data: every kind. Errors: MismatchError, AccessError, ConfigError before a weight is read; ModelError where no blocks
are found.

    lfm run distill.relation teacher=big student=small train=texts.jsonl --set angle=100 --out taught
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

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
    launched,
)
from lfm.core.errors import ConfigError
from lfm.core.heavy import nn, torch
from lfm.data.shares import classless
from lfm.distilling import answering, inside, relations
from lfm.distilling import lesson as lessons
from lfm.distilling.answering import Answering
from lfm.distilling.student import formed, smaller
from lfm.models import structure
from lfm.train import fit, training

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch


class Config(Answering, frozen=True):
    distance: Annotated[float, Meta(ge=0, description="β_D, weight of the distances between pairs")] = 25.0
    angle: Annotated[float, Meta(ge=0, description="β_A, weight of the angles of triples")] = 50.0
    similarity: Annotated[float, Meta(ge=0, description="β_S, weight of the similarities of pairs")] = 0.0
    places: Annotated[
        int, Meta(ge=0, description="blocks compared, evenly spaced and the last among them; 0: all of the shallower's")
    ] = 1


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    teacher, student = inputs.model("teacher"), inputs.model("student")
    records = classless(inputs.records("train"), student)
    lesson = lessons.lesson(records, teacher, student)
    gradients = student.ask(Gradients)
    module = formed(gradients.module(), config, run, lesson=lesson)
    own, theirs = inside.paired(module, teacher, config.places)
    answers, collate = answering.answered(config, lesson, teacher, module, run)
    collate = inside.shown(lesson, teacher, theirs, collate, run)
    kind = student.facts.task

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        with structure.watch(module, own) as seen:
            value = answers(module, batch)
        apart = torch.zeros((), device=value.device)
        for s, t in zip(seen, inside.maps(batch)):
            rows = [inside.pooled(x, inside.counted(batch, x.shape[1], kind)) for x in (inside.mapped(s, len(t)), t)]
            apart = apart + related(config, *rows)
        return value + apart / len(own)

    losses = fit(module, lesson.numbers, collate, loss, config, run)
    run.note(loss_before=losses[0], loss_after=losses[-1])
    return gradients.rewrap(module)


def related(config: Config, s: Tensor, t: Tensor) -> Tensor:
    """β_D D + β_A A + β_S S of rows (B, C), a scalar."""
    parts = (
        (config.distance, relations.distances),
        (config.angle, relations.angles),
        (config.similarity, relations.similarities),
    )
    return sum((weight * measure(s, t) for weight, measure in parts if weight), torch.zeros((), device=s.device))


def agree(config: Config, inputs: Inputs) -> None:
    teacher, student = inputs.model("teacher"), inputs.model("student")
    lessons.agree(teacher, student)
    lessons.readable(inputs, learned=config.alpha < 1)
    answering.agree(config, teacher)
    least = 3 if config.angle else 2 if config.distance or config.similarity else 1
    given = len(inputs.records("train"))
    held = min(config.batch_size, given) // launched.size()  # each process relates its own share
    if held < least:
        raise ConfigError(
            f"a batch of {held} has no {'angles' if least == 3 else 'pairs'}",
            why="how records lie to one another is compared within a batch",
            fix=(f"batch_size={least * launched.size()} or more" if given >= least else f"{least} records or more")
            + (", or angle=0" if held == 2 else ""),
        )


def cost(config: Config, sizes: Sizes) -> Cost:
    teacher, student = sizes.model("teacher"), sizes.model("student")
    asked = 1 + (config.alpha > 0)  # once for what is inside, once for its answers
    whole = training(config, smaller(config, student), sizes.data["train"], forwards=asked * teacher.parameters)
    return whole._replace(memory=whole.memory + 4 * student.parameters)


METHOD = Method(
    paper="arXiv:1904.05068",
    config=Config,
    models={
        "teacher": Slot((Features, Codec), also=(Logits, Gradients), help="the model whose relations are learned"),
        "student": Slot((Gradients, Codec), help="the model that learns them"),
    },
    data={
        "train": DataSlot(
            Data.UNLABELED,
            ("text", "completion", "label", "pair", "image", "audio", "fact"),
            help="what both are shown; text will do, and with alpha=1 classless records",
        )
    },
    run=run,
    cost=cost,
    agree=agree,
)
