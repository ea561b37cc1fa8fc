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

Measured (docs/distilling.md; one seed, a teacher of 3.1 M and 4096 tokens, a student of 0.26 M and 512): of 24 texts
the student alone comes to 2.00 bits a byte of others, with uld to 1.74, with spans to 1.67; of 400 texts in 100 steps
to 2.02 alone and 2.08 with spans: it is worth having where records are few, and did not pay where steps were.

Models: teacher (Logits, Codec), student (Gradients, Codec): causal language models, their tokenizers fast ones of any
kind. Data: text, completion, chat, each model's conversations by its own template. Errors: MismatchError before any
weight is read; ConfigError where weight and labels are 0; DataError where no two readings share a span; DivergedError.

    lfm run distill.cross_tokenizer teacher=big student=other train=texts.jsonl --out taught
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Logits, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import ConfigError, DataError, MismatchError
from lfm.core.heavy import F, nn, torch
from lfm.data import task as tasks
from lfm.data.language import IGNORED
from lfm.distilling import lesson as lessons
from lfm.distilling import spans as aligning
from lfm.distilling.student import Taught, formed, smaller
from lfm.distilling.telling import TOLD
from lfm.models import forward
from lfm.models.codec import pad, pad_id
from lfm.train import fit, training, worded
from lfm.train.losses import kl

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.model import Batch
    from lfm.distilling.spans import Reading, Span

PLACES, CHAIN, WHOLE = "places", "chain", "whole"
"""Names in a batch. places: (N,) where the student answers what TOLD is about, in its flat logits. chain: (M, 3) those
of spans of several tokens, the token and the span's number; whole: (S,) log π_t of these."""


class Config(Taught, frozen=True):
    kind: Annotated[Literal["spans", "sorted", "uld"], Meta(description="what is compared, and where")] = "spans"
    weight: Annotated[float, Meta(ge=0, description="of the teacher's answers")] = 1.5
    labels: Annotated[float, Meta(ge=0, description="of the records' own tokens")] = 1.0
    temperature: Annotated[float, Meta(gt=0, description="T, of both models' answers")] = 1.0


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    teacher, student = inputs.model("teacher"), inputs.model("student")
    codecs = [model.ask(Codec) for model in (student, teacher)]
    records = inputs.records("train")
    for codec, model in zip(codecs, (student, teacher), strict=True):
        records = tasks.fit(records, codec, model.facts)
    task, theirs = (tasks.task_for(records, c, m.facts) for c, m in zip(codecs, (student, teacher), strict=True))
    both = Pair(*(codec.tokenizer for codec in codecs))
    gradients = student.ask(Gradients)
    module = formed(gradients.module(), config, run, lesson=lessons.lesson(records, student, student))
    ask = teacher.ask(Logits).logits

    @cache  # a record is read once
    def readings(number: int) -> Read:
        ours = aligning.read(records[number], task, both.student)
        asked = aligning.read(records[number], theirs, both.teacher)
        return Read(ours, asked, aligning.align(ours, asked))

    if not any(readings(number).spans for number in range(len(records))):
        raise DataError(
            "teacher and student never end a token at the same place",
            why="none of the records gives two such places in a row",
            fix="longer records, or a tokenizer that keeps the text as it is",
        )
    compare = compared(config, both)

    def collate(numbers: Sequence[int]) -> Batch:
        read = [readings(number) for number in numbers]
        ours = pad([each.ours.ids for each in read], pad_id(both.student))
        asked = pad([each.theirs.ids for each in read], pad_id(both.teacher))
        labels = pad([each.ours.labels for each in read], IGNORED)["input_ids"]
        labels[:, 0] = IGNORED
        told = compare.tell(ask(asked), read, ours["input_ids"].shape[1])
        return {**ours, "labels": labels, **{name: tensor.clone() for name, tensor in told.items()}}

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        logits = forward(module, batch)
        total = config.weight * compare.gap(logits.flatten(0, 1), batch)
        if config.labels:
            scored, labels = task.scored(logits, batch)
            total = total + config.labels * F.cross_entropy(scored, labels)
        return total

    losses = fit(module, range(len(records)), collate, loss, config, run)
    run.note(loss_before=losses[0], loss_after=losses[-1])
    return gradients.rewrap(module)


class Read(NamedTuple):
    """A record as both read it, and the spans that they share."""

    ours: Reading
    theirs: Reading
    spans: list[Span]


class Pair(NamedTuple):
    """The tokenizers."""

    student: Any
    teacher: Any


class Compared(NamedTuple):
    """tell: the teacher's (B, T, V) logits, the readings and the width of the student's batch → what is told of them.
    gap: the student's flat logits and the batch → D."""

    tell: Callable[[Tensor, Sequence[Read], int], dict[str, Tensor]]
    gap: Callable[[Tensor, Batch], Tensor]


def compared(config: Config, both: Pair) -> Compared:
    return _spans(config, both) if config.kind == "spans" else _sorted(config)


def _sorted(config: Config) -> Compared:
    def told(logits: Tensor) -> Tensor:
        return F.softmax(logits.float() / config.temperature, -1).sort(-1, descending=True).values

    def tell(logits: Tensor, read: Sequence[Read], width: int) -> dict[str, Tensor]:
        pairs = [_pairs(each, config.kind) for each in read]
        ours = [row * width + place - 1 for row, some in enumerate(pairs) for place, _ in some]
        theirs = [row * logits.shape[1] + place - 1 for row, some in enumerate(pairs) for _, place in some]
        return {PLACES: torch.tensor(ours, dtype=torch.long), TOLD: told(_rows(logits.flatten(0, 1), theirs))}

    def gap(logits: Tensor, batch: Batch) -> Tensor:
        if not len(batch[PLACES]):
            return logits.sum() * 0.0
        s, t = told(logits[batch[PLACES]]), batch[TOLD]
        width = max(s.shape[-1], t.shape[-1])
        s, t = (F.pad(x, (0, width - x.shape[-1])) for x in (s, t))
        return (s - t).abs().sum(-1).mean()

    return Compared(tell, gap)


def _pairs(read: Read, kind: str) -> list[tuple[int, int]]:
    """Places of tokens whose predictions are compared."""
    if kind == "sorted":
        return [(span.ours[0], span.theirs[0]) for span in read[2]]
    scored = [[i for i, label in enumerate(r.labels) if i and label != IGNORED] for r in read[:2]]
    return list(zip(*scored))


def _spans(config: Config, both: Pair) -> Compared:
    made: dict[tuple[int, int], tuple[Tensor, Tensor, int]] = {}

    def classes(ours: int, theirs: int) -> tuple[Tensor, Tensor, int]:
        if (ours, theirs) not in made:
            found = aligning.classes(both.student, both.teacher, (ours, theirs))
            made[ours, theirs] = torch.tensor(found.ours), torch.tensor(found.theirs), found.many
        return made[ours, theirs]

    def tell(logits: Tensor, read: Sequence[Read], width: int) -> dict[str, Tensor]:
        flat = logits.flatten(0, 1)
        rows = [(row, mine, other, span) for row, (mine, other, some) in enumerate(read) for span in some]
        first = [row * width + span.ours[0] - 1 for row, _, _, span in rows]
        answers = [row * logits.shape[1] + span.theirs[0] - 1 for row, _, _, span in rows]
        several = [each for each in rows if not each[3].single]
        ours = [
            (row * width + place - 1, reading.ids[place], number)
            for number, (row, reading, _, span) in enumerate(several)
            for place in range(*span.ours)
        ]
        theirs = [
            (row * logits.shape[1] + place - 1, reading.ids[place], number)
            for number, (row, _, reading, span) in enumerate(several)
            for place in range(*span.theirs)
        ]
        return {
            PLACES: torch.tensor(first, dtype=torch.long),
            TOLD: _rows(flat, answers),
            CHAIN: _chain(ours),
            WHOLE: whole(flat, _chain(theirs).to(flat.device), len(several)),
        }

    def gap(logits: Tensor, batch: Batch) -> Tensor:
        count = len(batch[PLACES])
        if not count:
            return logits.sum() * 0.0
        t, s = batch[TOLD], logits[batch[PLACES]]
        ours, theirs, classes_ = classes(s.shape[-1], t.shape[-1])
        p, q = (summed(x / config.temperature, c, classes_) for x, c in ((t, theirs), (s, ours)))
        total = config.temperature**2 * kl(p, q).sum()
        if len(batch[WHOLE]):
            total = total + kl(*map(_either, (batch[WHOLE], whole(logits, batch[CHAIN], len(batch[WHOLE]))))).sum()
        return total / count

    return Compared(tell, gap)


def summed(logits: Tensor, classes: Tensor, count: int) -> Tensor:
    """(N, count) log-probabilities of classes, of logits (N, V) whose tokens are of these classes (V,)."""
    p = F.softmax(logits.float(), -1)
    least = torch.finfo(p.dtype).tiny  # a class that neither has, or that one of them all but rules out
    return p.new_zeros(len(p), count).index_add(1, classes.to(p.device), p).clamp(min=least).log()


def whole(logits: Tensor, chain: Tensor, count: int) -> Tensor:
    """(count,) log-probabilities of spans: the sum over their tokens, chain (M, 3): place in logits, token, span."""
    told = F.log_softmax(logits[chain[:, 0]].float(), -1).gather(-1, chain[:, 1:2])[:, 0]
    return told.new_zeros(count).index_add(0, chain[:, 2], told)


def _either(logprobs: Tensor) -> Tensor:
    """(N, 2): it, or anything else."""
    return torch.stack([logprobs, torch.log(-torch.expm1(logprobs.clamp(max=-1e-6)))], -1)


def _rows(flat: Tensor, places: Sequence[int]) -> Tensor:
    return flat[torch.tensor(places, dtype=torch.long, device=flat.device)].float()


def _chain(found: Sequence[tuple[int, int, int]]) -> Tensor:
    return torch.tensor(found, dtype=torch.long).reshape(-1, 3)


def agree(config: Config, inputs: Inputs) -> None:
    if not config.weight and not config.labels:
        raise ConfigError("nothing is learned", why="weight and labels are both 0", fix="weight=1.5, or labels=1")
    for model in (inputs.model("teacher"), inputs.model("student")):
        if model.facts.task != "causal-lm":
            raise MismatchError(
                f"{model.ref} is a {model.facts.task or 'model without a task'}",
                why="tokens are compared where both models have read the same text and say what comes next",
                fix="two causal language models",
            )
    worded(inputs.records("train"))


def cost(config: Config, sizes: Sizes) -> Cost:
    teacher, student = sizes.model("teacher"), sizes.model("student")
    whole = training(config, smaller(config, student), sizes.data["train"], forwards=teacher.parameters)
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
