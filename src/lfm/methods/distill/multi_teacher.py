"""Train a student on several teachers' answers, weighted example by example.

    L = (1 − α) CE(y, p) + α T² Σ_k w_k KL(pᵏ_T ‖ p_T),   p_T = softmax(logits / T)
    fixed       w_k = `weights`, or 1/K
    confidence  w_k = (1 − softmax_k CE(y, pᵏ)) / (K − 1)        a teacher far from the label counts less
    entropy     w_k = (1 − H(pᵏ) / Σ_j H(pʲ)) / (K − 1)          one that is unsure counts less
    agreement   w_k = (1 − d_k / Σ_j d_j) / (K − 1),  d_k = KL(pᵏ ‖ mean_j pʲ)       one that stands alone counts less

Paper: Confidence-aware multi-teacher knowledge distillation, arXiv 2201.00007, without its features; entropy is EBKD's,
which that paper compares with. `agreement` is ours, and needs no labels. Differs: weights sum to one over the teachers
(the authors' code divides by K once more). Σ w_k KL(pᵏ ‖ p) is KL(Σ w_k pᵏ ‖ p) up to what the student cannot change,
so the teachers' mixture is what is learned, and the loss is that.

Measured (docs/distilling.md): of two experts, each at home in half of the records, a small ViT learns .766 by fixed
weights, .797 by entropy, .823 by confidence, where it learns .800 from labels alone: means of three seeds.

Models: teacher, two or more, each of any access that distill.response takes (its logits, answers that were kept,
classes, likeliest tokens; what the k likeliest leave is spread evenly); student (Gradients, Codec). Data: every kind;
with alpha=1 and another weighting than confidence the classes of records may be empty. Classifiers are asked once a
record, answers kept. Errors: MismatchError before any weight is read; ConfigError where `weights` and teachers differ
in number; DataError where a class is empty and is asked for; DivergedError.

    lfm run distill.multi_teacher teacher=one teacher=two student=small train=texts.jsonl --out taught
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import ConfigError
from lfm.core.heavy import F, nn, torch
from lfm.data.shares import classless
from lfm.distilling import answering
from lfm.distilling import lesson as lessons
from lfm.distilling.answers import ACCESS, queries
from lfm.distilling.student import Taught, formed, smaller
from lfm.distilling.telling import IDS, TOLD, gap, hard, weighed
from lfm.distilling.together import told_by, told_by_all
from lfm.models import forward
from lfm.train import fit, training
from lfm.train.losses import complete, kl

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch

SUREST = 1e4
"""Nats of cross-entropy, at most: of teachers that give the right answer no probability none counts less."""
Weighting = Literal["fixed", "confidence", "entropy", "agreement"]


class Config(Taught, frozen=True):
    weighting: Annotated[Weighting, Meta(description="fixed, or by example: confidence, entropy, agreement")] = (
        "confidence"
    )
    weights: Annotated[
        tuple[float, ...], Meta(description="of fixed: one a teacher, in their order; none: all the same")
    ] = ()
    temperature: Annotated[float, Meta(ge=0, description="T, of all models' answers; 0: 1 of words, 4 of classes")] = (
        0.0
    )
    alpha: Annotated[
        float, Meta(ge=0, le=1, description="weight of the teachers' answers against the labels'; 0: not asked")
    ] = 0.9


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    teachers, student = inputs.all("teacher"), inputs.model("student")
    records = classless(inputs.records("train"), student)
    taught = [lessons.lesson(records, teacher, student) for teacher in teachers]
    task = taught[0].task
    gradients = student.ask(Gradients)
    module = formed(gradients.module(), config, run, lesson=taught[0])
    temperature = answering.softness(config.temperature, taught[0])

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        logits, labels = task.scored(forward(module, batch), batch)
        if config.alpha == 0:
            return hard(logits, labels)
        answers = told([told_by(batch, k) for k in range(len(teachers))], logits.shape[-1])
        theirs = mixture(answers, weights(answers, labels, config), temperature)
        return weighed(logits, labels, config.alpha, gap(logits, {TOLD: theirs}, temperature))

    collate = told_by_all(taught, teachers, run) if config.alpha else taught[0].collate
    losses = fit(module, taught[0].numbers, collate, loss, config, run)
    run.note(loss_before=losses[0], loss_after=losses[-1])
    return gradients.rewrap(module)


def told(heard: list[Batch], width: int) -> Tensor:
    """(K, N, V) logits of K teachers; of k likeliest answers, with what is left spread evenly."""
    whole = [complete(one[IDS], one[TOLD], width) if IDS in one else one[TOLD].float() for one in heard]
    least = min(width, *(one.shape[-1] for one in whole))  # a vocabulary may be padded to a round number
    return torch.stack([one[:, :least] for one in whole])


def weights(answers: Tensor, labels: Tensor, config: Config) -> Tensor:
    """(K, N), each column's sum 1, of teachers' logits (K, N, V) and the right answers (N,)."""
    count = len(answers)
    if config.weighting == "fixed":
        given = torch.tensor(config.weights or [1.0] * count, device=answers.device)
        return (given / given.sum())[:, None].expand(count, answers.shape[1])
    p = F.log_softmax(answers, -1)
    if config.weighting == "confidence":
        wrong = -p.gather(-1, labels.expand(count, -1)[..., None])[..., 0]
        share = F.softmax(wrong.clamp(max=SUREST), 0)
        return (1 - share) / (count - 1)
    if config.weighting == "entropy":
        doubt = torch.special.entr(p.exp()).sum(-1)
    else:
        doubt = kl(p, torch.logsumexp(p, 0) - torch.log(torch.tensor(float(count)))).clamp(min=0)
    tiny = torch.finfo(doubt.dtype).tiny  # all sure, or all of one mind: none counts less
    return (1 - (doubt + tiny) / (doubt + tiny).sum(0)) / (count - 1)


def mixture(answers: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """(N, V) logits whose softmax at T is Σ_k w_k softmax(answers_k / T)."""
    return temperature * torch.logsumexp(F.log_softmax(answers / temperature, -1) + weights.log()[..., None], 0)


def agree(config: Config, inputs: Inputs) -> None:
    teachers = inputs.all("teacher")
    for teacher in teachers:
        lessons.agree(teacher, inputs.model("student"))
    lessons.readable(inputs, learned=config.alpha < 1 or config.weighting == "confidence")
    if config.weights and (len(config.weights) != len(teachers) or min(config.weights) < 0 or not sum(config.weights)):
        raise ConfigError(
            f"weights={list(config.weights)} for {len(teachers)} teachers",
            why="each has one, none of them below 0, and not all 0",
            fix="give one a teacher, in their order",
        )
    if config.weights and config.weighting != "fixed":
        what = f"weighting={config.weighting} finds the weights itself"
        raise ConfigError(what, fix="weighting=fixed, or no weights")


def cost(config: Config, sizes: Sizes) -> Cost:
    student = sizes.model("student")
    teachers = sizes.models["teacher"] if config.alpha else ()
    beside = sum(facts.parameters for facts in teachers)
    whole = training(config, smaller(config, student), sizes.data["train"], forwards=beside)
    given = sizes.gives.get("teacher", ())
    asked = [queries(sizes._replace(gives={"teacher": (one,)})) for one in given] if teachers else []
    return whole._replace(
        memory=whole.memory + 4 * student.parameters,
        queries=sum(count for count, _ in asked),
        tokens=sum(tokens for _, tokens in asked),
    )


METHOD = Method(
    paper="arXiv:2201.00007",
    config=Config,
    models={
        "teacher": Slot((), any_of=ACCESS, also=(Codec,), min=2, max=None, help="the models whose answers are learned"),
        "student": Slot((Gradients, Codec), help="the model that learns them"),
    },
    data={
        "train": DataSlot(
            Data.UNLABELED,
            ("text", "completion", "label", "pair", "image", "audio", "fact"),
            help="what the teachers are asked",
        )
    },
    forms=("checkpoint",),
    run=run,
    cost=cost,
    agree=agree,
)
