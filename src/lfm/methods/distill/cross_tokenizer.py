"""Train a student on the answers of a teacher with another tokenizer.

    L = labels · CE + weight · D
    spans:   D = mean over spans of T² KL(P_t ‖ P_s) at its first token + KL(π_t ‖ π_s),  π = Π_i p(token_i | before)
    sorted:  D = mean over spans of Σ_i |sort(p_t)_i − sort(p_s)_i| at its first token
    uld:     the same, between the i-th token of the one's answer and the i-th of the other's

Papers: universal logit distillation, arXiv 2402.12030 (`uld`, weight 1.5 there); the alignment of `spans` and `sorted`
by bytes and its chain rule, TRL's GOLD trainer and X-Token, arXiv 2605.21699. A span is what both models say between
one place where both have read the same bytes and the next. At its first token each model's next tokens are summed into
classes P: a token that both have by its bytes is one, any other goes with its longest beginning that both have, so that
a word that one of them writes in two tokens counts as the first of these. Where a span is several tokens of either, its
probability π by the chain rule is compared too, as one outcome against all others.

Differs: GOLD multiplies a whole distribution by the chance of a span's other tokens, which leaves no distribution; here
both terms are divergences of proper ones, and with equal tokenizers D is ordinary distillation. X-Token learns its
projection; here it is the rule above. `uld` compares what does not belong together after the first token that differs,
and is there to be compared with.

Neither model's logits are ever whole, where they are a linear function of hidden states: those of places that are
looked at are made a few at a time, the student's again for their gradient, since a span's places hang together.

Measured (docs/distilling.md; one seed, a teacher of 3.1 M and 4096 tokens, a student of 0.26 M and 512): of 24 texts
the student alone comes to 2.00 bits a byte of others, with uld to 1.74, with spans to 1.67; of 400 texts in 100 steps
to 2.02 alone and 2.08 with spans: it is worth having where records are few, and did not pay where steps were.

Models: teacher (Logits, Codec), student (Gradients, Codec): causal language models, their tokenizers fast ones of any
kind. Data: text, completion, chat, each model's conversations by its own template. Errors: MismatchError before any
weight is read; ConfigError where weight and labels are 0; DataError where no two readings share a span; DivergedError.

    lfm run distill.cross_tokenizer teacher=big student=other train=texts.jsonl --out taught
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Logits, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import ConfigError, DataError, MismatchError
from lfm.core.heavy import F, nn, torch
from lfm.data import task as tasks
from lfm.data.language import IGNORED
from lfm.distilling import across, spans
from lfm.distilling import lesson as lessons
from lfm.distilling.across import CHAIN, FIRST, ROWS, SCORED, WHOLE, Read
from lfm.distilling.student import Taught, formed, smaller
from lfm.distilling.telling import heard
from lfm.models import forward
from lfm.models.headless import headless
from lfm.train import fit, training
from lfm.train.headed import rowwise
from lfm.train.losses import kl

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch


class Config(Taught, frozen=True):
    kind: Annotated[Literal["spans", "sorted", "uld"], Meta(description="what is compared, and where")] = "spans"
    weight: Annotated[float, Meta(ge=0, description="of the teacher's answers")] = 1.5
    labels: Annotated[float, Meta(ge=0, description="of the records' own tokens")] = 1.0
    temperature: Annotated[float, Meta(gt=0, description="T, of both models' answers")] = 1.0


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    teacher, student = inputs.model("teacher"), inputs.model("student")
    records = inputs.records("train")
    for model in (student, teacher):
        records = tasks.fit(records, model.ask(Codec), model.facts)
    lesson = lessons.lesson(records, student, student)
    gradients = student.ask(Gradients)
    module = formed(gradients.module(), config, run, lesson=lesson)
    read = across.reading(records, student, teacher)
    if not any(read(number).spans for number in range(len(records))):
        raise DataError(
            "teacher and student never end a token at the same place",
            why="none of the records gives two such places in a row",
            fix="longer records, or a tokenizer that keeps the text as it is",
        )
    spanned = config.kind == "spans"
    how = {"labels": bool(config.labels), "chains": spanned}
    collate = across.collating(read, student, teacher, lambda read: pairs(read, config.kind), **how)
    measured = by_classes(config, student, teacher) if spanned else by_rank(config)
    body = headless(module, lesson.collate(lesson.numbers[:1]))

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        answers = body(module, batch) if body else forward(module, batch)
        measure = across.compared(batch, lambda logits, about: measured(logits, heard(batch, about)))
        said, far = rowwise(across.rows_of(answers, batch[ROWS]), measure).unbind(-1)
        apart = far.sum()
        if spanned:
            ours = across.chained(said[batch[CHAIN][:, 0]], batch[CHAIN][:, 1], len(batch[WHOLE]))
            apart = config.temperature**2 * apart + kl(_either(batch[WHOLE]), _either(ours)).sum()
        total = config.weight * apart / max(len(batch[FIRST]), 1)
        right = batch[SCORED].to(said.dtype)
        return total - config.labels * (said * right).sum() / right.sum().clamp(min=1)

    losses = fit(module, lesson.numbers, collate, loss, config, run)
    run.note(loss_before=losses[0], loss_after=losses[-1])
    return gradients.rewrap(module)


def pairs(read: Read, kind: str) -> list[tuple[int, int]]:
    """Places of tokens whose predictions are compared, the student's and the teacher's."""
    if kind != "uld":
        return [(span.ours[0], span.theirs[0]) for span in read.spans]
    ours, theirs = ([i for i, label in enumerate(r.labels) if i and label != IGNORED] for r in read[:2])
    return list(zip(ours, theirs))


Apart = Callable[["Tensor", "Tensor"], "Tensor"]
"""(the student's logits (n, V), the teacher's (n, V')) → how far they are from one another, (n,)."""


def by_rank(config: Config) -> Apart:
    """Σ_i |sort(p_t)_i − sort(p_s)_i|."""

    def apart(logits: Tensor, told: Tensor) -> Tensor:
        both = [F.softmax(x.float() / config.temperature, -1).sort(-1, descending=True).values for x in (logits, told)]
        width = max(x.shape[-1] for x in both)
        s, t = (F.pad(x, (0, width - x.shape[-1])) for x in both)
        return (s - t).abs().sum(-1)

    return apart


def by_classes(config: Config, student: Model, teacher: Model) -> Apart:
    """KL(P_t ‖ P_s) of the classes that both can tell."""
    mine, other = (model.ask(Codec).tokenizer for model in (student, teacher))

    @cache
    def classes(ours: int, theirs: int) -> tuple[Any, Any, int]:
        found = spans.classes(mine, other, (ours, theirs))
        return torch.tensor(found.ours), torch.tensor(found.theirs), found.many

    def apart(logits: Tensor, told: Tensor) -> Tensor:
        ours, theirs, many = classes(logits.shape[-1], told.shape[-1])
        return kl(summed(told / config.temperature, theirs, many), summed(logits / config.temperature, ours, many))

    return apart


def summed(logits: Tensor, classes: Tensor, count: int) -> Tensor:
    """(N, count) log-probabilities of classes, of logits (N, V) whose tokens are of these classes (V,)."""
    p = F.softmax(logits.float(), -1)
    least = torch.finfo(p.dtype).tiny  # a class that neither has, or that one of them all but rules out
    return p.new_zeros(len(p), count).index_add(1, classes.to(p.device), p).clamp(min=least).log()


def _either(logprobs: Tensor) -> Tensor:
    """(N, 2): it, or anything else."""
    return torch.stack([logprobs, torch.log(-torch.expm1(logprobs.clamp(max=-1e-6)))], -1)


def agree(config: Config, inputs: Inputs) -> None:
    if not config.weight and not config.labels:
        raise ConfigError("nothing is learned", why="weight and labels are both 0", fix="weight=1.5, or labels=1")
    for model in (inputs.model("teacher"), inputs.model("student")):
        if model.facts.task != "causal-lm":
            raise MismatchError(
                f"{model.ref} does not say what comes next",
                why=f"it is for {model.facts.task or 'no known task'}, and next tokens are what is compared",
                fix="two causal language models",
            )
    lessons.readable(inputs)


def cost(config: Config, sizes: Sizes) -> Cost:
    teacher, student = sizes.model("teacher"), sizes.model("student")
    whole = training(config, smaller(config, student), sizes.data["train"], forwards=teacher.parameters, logits=0)
    return whole._replace(memory=whole.memory + 4 * student.parameters)


METHOD = Method(
    paper="arXiv:2402.12030",
    config=Config,
    models={
        "teacher": Slot((Logits, Codec), help="the model whose answers are learned"),
        "student": Slot((Gradients, Codec), help="the model that learns them, with tokens of its own"),
    },
    data={"train": DataSlot(Data.UNLABELED, ("text", "completion", "chat"), help="what both models read")},
    run=run,
    cost=cost,
    agree=agree,
)
