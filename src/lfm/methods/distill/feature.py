"""Train a student to be like its teacher inside, and to answer like it.

    L = (1 − α) CE + α T² KL(pᵗ_T ‖ p_T) + β · mean over places d(h_s, h_t)
    fitnets    d = ‖W h_s − h_t‖² / ‖h_t‖²              W is learned beside, and dropped at the end
    attention  d = ‖q_s/‖q_s‖ − q_t/‖q_t‖‖²             q = Σ_c h_c², one number a position
    affinity   d = ‖ĥ_sᵀĥ_s − ĥ_tᵀĥ_t‖²_F / N²          cosines of all pairs of the N positions: O(N² C)
    ffa        d = ‖(ĥ_sᵀĥ_s − ĥ_tᵀĥ_t) Z‖²_F / (k N²)  Z (N, k) drawn anew each step: the same on average, O(N C k)

Paper: FitNets, arXiv 1412.6550; attention transfer 1612.03928; feature affinity, exact and fast, 2302.10899. Differs:
the hint is learned together with the answers, not before them, and is relative to the size of the teacher's features;
attention's difference is squared and summed, as between 0 and 2 (its authors' code takes the mean over positions, and
adds places up: their β = 1000 is here 1000 · places / N). `places` blocks or stages of both models are compared, at the
same shares of their depth: a position is a token, a patch, a pixel of a convolution's map, or a frame. Padding does not
count.

On zoo:vit's digits no kind added to what answers alone give, within the noise of three seeds (docs/distilling.md).

Models: teacher (Features, Codec; Logits unless alpha=0; Gradients tells how deep a convolutional one is), student
(Gradients, Codec). Two language models must share kind and vocabulary, two classifiers the names of their classes, and
those of texts the vocabulary too. Maps of images of other sizes are averaged down to the smaller. Data: every kind.
Errors: MismatchError, AccessError before a weight is read; ModelError where no blocks or stages are found.

    lfm run distill.feature teacher=big student=small train=texts.jsonl --set kind=ffa --out taught
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

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
from lfm.core.heavy import nn, torch
from lfm.data.shares import classless
from lfm.distilling import answering, inside
from lfm.distilling import lesson as lessons
from lfm.distilling.answering import Answering
from lfm.distilling.student import formed, smaller
from lfm.models import device, forward, structure
from lfm.train import fit, seeded, training

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch


class Config(Answering, frozen=True):
    kind: Annotated[
        Literal["fitnets", "attention", "ffa", "affinity"],
        Meta(description="what is compared; ffa is affinity by chance"),
    ] = "fitnets"
    beta: Annotated[float, Meta(ge=0, description="weight of what is inside")] = 1.0
    places: Annotated[
        int, Meta(ge=0, description="blocks compared, evenly spaced and the last among them; 0: all of the shallower's")
    ] = 2
    draws: Annotated[int, Meta(ge=1, description="k, random directions that ffa draws at each step")] = 8


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
    whole = nn.ModuleDict({"student": module, "hints": _hints(config, module, own, collate, lesson, run)})

    def loss(whole: Any, batch: Batch) -> Tensor:
        with structure.watch(whole["student"], own) as seen:
            value = answers(whole["student"], batch)
        apart = torch.zeros((), device=value.device)
        for i, (s, t) in enumerate(zip(seen, inside.maps(batch))):
            s = inside.mapped(s, len(t))
            if config.kind == "fitnets":
                s = whole["hints"][i](s.float())
            s, t = inside.matched(s, t, kind)
            apart = apart + _apart(config, s, t, inside.counted(batch, s.shape[1], kind))
        return value + config.beta * apart / len(own)

    losses = fit(whole, lesson.numbers, collate, loss, config, run)
    run.note(loss_before=losses[0], loss_after=losses[-1])
    return gradients.rewrap(module)


def _hints(config: Config, module: nn.Module, sites: Any, collate: Any, lesson: Any, run: Run) -> nn.ModuleList:
    """A linear map to the teacher's width for each place; it begins as the identity where the widths are the same."""
    if config.kind != "fitnets":
        return nn.ModuleList()
    batch = collate(lesson.numbers[:1])
    module.to(device())
    with torch.no_grad(), structure.watch(module, sites) as seen:
        forward(module, batch)
    widths = [(inside.mapped(s, 1).shape[-1], t.shape[-1]) for s, t in zip(seen, inside.maps(batch))]
    with seeded(run.seed_for("hints")):
        hints = [nn.Linear(s, t) for s, t in widths]
    for hint, (s, t) in zip(hints, widths):
        if s == t:
            nn.init.eye_(hint.weight)
            nn.init.zeros_(hint.bias)
    return nn.ModuleList(hints)


def _apart(config: Config, s: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
    match config.kind:
        case "fitnets":
            return inside.hint(s, t, mask)
        case "attention":
            return inside.attention(s, t, mask)
        case "affinity":
            return inside.affinity(s, t, mask)
        case "ffa":
            return inside.fast_affinity(s, t, config.draws, mask)


def agree(config: Config, inputs: Inputs) -> None:
    teacher, student = inputs.model("teacher"), inputs.model("student")
    lessons.agree(teacher, student)
    inside.agree(teacher, student)
    lessons.readable(inputs, learned=config.alpha < 1)
    answering.agree(config, teacher)


def cost(config: Config, sizes: Sizes) -> Cost:
    teacher, student = sizes.model("teacher"), sizes.model("student")
    asked = 1 + (config.alpha > 0)  # once for what is inside, once for its answers
    whole = training(config, smaller(config, student), sizes.data["train"], forwards=asked * teacher.parameters)
    return whole._replace(memory=whole.memory + 4 * student.parameters)


METHOD = Method(
    paper="arXiv:1412.6550",
    config=Config,
    models={
        "teacher": Slot((Features, Codec), also=(Logits, Gradients), help="the model whose inside is learned"),
        "student": Slot((Gradients, Codec), help="the model that learns it"),
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
