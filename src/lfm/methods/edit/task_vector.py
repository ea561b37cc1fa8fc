"""Make a model forget what others were fine-tuned for, learn it, or take the fourth term of an analogy.

    θ = θ_base + λ (Σ_learn τᵢ − Σ_forget τⱼ),   τ = θ_tuned − θ_base

    forget=t                    negation: θ_base − λ τ_t, which fails at t
    learn=a learn=b             addition: what a and b were fine-tuned for
    learn=b learn=c forget=a    analogy: a is to b as c is to the result, for which there were no data

Paper: Editing models with task arithmetic, arXiv 2212.04089. λ is chosen as there: of `scales`, those are allowed that
keep 95 % of the base's accuracy on `control`, and of these the one is taken that is best on `learned`, worst on
`forgotten`, or by the difference of the two; of equals the smallest. With `control` alone the largest allowed is taken.
Where no λ above 0 is allowed the base comes back, and the run's notes say so. Without data λ is `scale`, by default
the authors' 0.4. The notes hold accuracy and loss before and after on the records that chose: slightly too good.

On the zoo's eight experts, measured on other images than those that chose: negation takes 13 to 31 points off the
expert's task and 2 to 7 off the seven others (once none). An analogy there (turned + noisy − plain, for digits that are
turned and noisy) reaches 84.2 %, the sum without the minus 78.9, the better of its experts alone 85.3, the base 51.9.

Models: equal architecture, vocabulary, tensor names and shapes, the base's too. The result has the base's files and
dtypes; arithmetic is in fp64 and rounded once. Integer tensors must be equal in all. Tensors are streamed; to choose,
one candidate at a time is in memory. Data: any records with a task; of text the accuracy is that of tokens. Errors:
MismatchError before any weight is read; SlotError for nothing to learn or forget, or for `forgotten` without `control`;
CorruptError naming a tensor that holds a NaN or an infinity; DataError for records that set the model no task.

    lfm run edit.task_vector base=base forget=rude forgotten=rude.jsonl control=others.jsonl --out polite
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import lfm.core
from lfm.core import Codec, Cost, Data, DataSlot, Inputs, Logits, Meta, Method, Model, Run, Sizes, Slot, Weights
from lfm.core.errors import SlotError
from lfm.fusing import Rule, fuse
from lfm.fusing.inputs import memory, opened
from lfm.fusing.joins import added, change
from lfm.tensors import match
from lfm.train.examine import Criterion, Score, examiner

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor

ADVISED = 0.4
"""λ that the authors advise without data to choose it by."""

Scale = Annotated[float, Meta(ge=0)]
Scores = Mapping[str, Score]
"""By role of data."""


class Config(lfm.core.Config, frozen=True):
    scale: Annotated[
        Annotated[float, Meta(ge=0)] | None, Meta(description="λ; null: chosen on the data, 0.4 without any")
    ] = None
    scales: Annotated[tuple[Scale, ...], Meta(min_length=1, description="λ that are tried; 0 always is")] = tuple(
        round(0.05 * i, 2) for i in range(1, 21)
    )
    keep: Annotated[
        float, Meta(gt=0, le=1, description="share of the base's accuracy on `control` to keep; of 1 / loss by loss")
    ] = 0.95
    by: Annotated[Criterion, Meta(description="what is measured: accuracy (of classes or tokens), or loss")] = (
        "accuracy"
    )


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    base, learn, forget = inputs.model("base"), inputs.all("learn"), inputs.all("forget")
    names, (start, *tensors) = opened((base, *learn, *forget))
    signs = (1.0,) * len(learn) + (-1.0,) * len(forget)

    def at(scale: float) -> Model:
        rule = Rule(added, first=change, given=lambda name: {"weight": signs, "scale": scale})
        made: dict[str, LazyTensor] = fuse(rule, names, tensors, base=start)
        return base.ask(Weights).replace(made)

    exams = {role: examiner(inputs.records(role), base) for role in METHOD.data if inputs.records(role)}
    if not exams:
        scale = ADVISED if config.scale is None else config.scale
        run.note(scale=scale)
        return at(scale)

    def measure(scale: float) -> dict[str, list[float]]:
        logits = (at(scale) if scale else base).ask(Logits).logits
        return {role: list(exam(logits)) for role, exam in exams.items()}

    swept = sorted({0.0, *(config.scales if config.scale is None else [config.scale])})
    found: dict[float, Scores] = {}
    for scale in run.track(swept, "λ"):
        told = run.step(f"scale-{scale}", lambda scale=scale: measure(scale))
        found[scale] = {role: Score(*numbers) for role, numbers in told.items()}
        for role, score in found[scale].items():
            run.curve(f"{config.by} on {role}, by λ", getattr(score, config.by))
    best = chosen(found, config) if config.scale is None else config.scale
    run.note(scale=best)
    if not best and config.scale is None:
        run.note(result="the base as it is: no λ above 0 does better and keeps what control asks")
    for scale, when in ((0.0, "before"), (best, "after")):
        for role, score in found[scale].items():
            run.note(**{f"{role}_{quantity}_{when}": value for quantity, value in score._asdict().items()})
    return at(best)


def chosen(found: Mapping[float, Scores], config: Config) -> float:
    """The λ by the paper's rule, of those measured; 0 is among them and always allowed."""
    allowed = [scale for scale in sorted(found) if _kept(found[scale], found[0.0], config)]
    if not found[0.0].keys() - {"control"}:
        return allowed[-1]
    return max(allowed, key=lambda scale: _aim(found[scale], config.by))


def _kept(scores: Scores, before: Scores, config: Config) -> bool:
    if "control" not in scores:
        return True
    now, then = scores["control"], before["control"]
    if config.by == "loss":
        return now.loss * config.keep <= then.loss
    return now.accuracy >= config.keep * then.accuracy


def _aim(scores: Scores, by: Criterion) -> float:
    """How much better it is on what is learned than on what is forgotten."""
    value = {role: -score.loss if by == "loss" else score.accuracy for role, score in scores.items()}
    return value.get("learned", 0.0) - value.get("forgotten", 0.0)


def agree(config: Config, inputs: Inputs) -> None:
    others = [*inputs.all("learn"), *inputs.all("forget")]
    if not others:
        raise SlotError("edit.task_vector has nothing to learn or forget", fix="add learn=REF or forget=REF")
    if config.scale is None and inputs.records("forgotten") and not inputs.records("control"):
        raise SlotError(
            "edit.task_vector needs data for 'control' where λ is chosen on 'forgotten'",
            why="the further it goes the worse it is on them, and on everything else",
            fix="add control=FILE, or --set scale=…",
        )
    match.agree([inputs.model("base"), *others])


def cost(config: Config, sizes: Sizes) -> Cost:
    base, count = sizes.model("base"), sum(len(models) for models in sizes.models.values())
    tokens, records = (sum(amount[i] for amount in sizes.data.values()) for i in (1, 0))
    tried = (1 + (1 if config.scale is not None else len(config.scales))) if records else 0
    return Cost(
        flops=base.parameters * (4.0 * count * (1 + tried) + 2.0 * tokens * tried),
        steps=tried * (1 + records // 64),
        memory=memory(sizes) + (12 * base.parameters if tried else 0),
        disk=base.bytes,
    )


RECORDS = ("text", "completion", "label", "pair", "image", "fact")

METHOD = Method(
    paper="arXiv:2212.04089",
    config=Config,
    models={
        "base": Slot((Weights, Logits, Codec), help="what the others were fine-tuned from"),
        "learn": Slot((Weights,), min=0, max=None, help="fine-tuned models whose change is added"),
        "forget": Slot((Weights,), min=0, max=None, help="fine-tuned models whose change is taken away"),
    },
    data={
        "learned": DataSlot(Data.FEW_SHOT, RECORDS, optional=True, help="held-out records to do well on"),
        "forgotten": DataSlot(Data.FEW_SHOT, RECORDS, optional=True, help="held-out records to fail on"),
        "control": DataSlot(Data.FEW_SHOT, RECORDS, optional=True, help="held-out records to stay as good on"),
    },
    run=run,
    cost=cost,
    agree=agree,
    forms=("checkpoint",),
)
