"""Walk from a base to its fine-tuned model, and stop where the data say.

    θ_α = (1 − α) θ₀ + α θ₁

Paper: WiSE-FT, arXiv 2109.01903. α is swept over `alphas` and the best on `data` is kept; with `alpha` set, that one is
(the paper recommends 0.5 where there is nothing to choose on). Every α is also measured on `shifted`, data of another
distribution, which takes no part in the choice: the paper's claim is that some way before the end is better on both.
Both ends are among the candidates, so that the result is never worse on `data` than either model.

Models: base and model with equal architecture, vocabulary, tensor names and shapes. The result has the fine-tuned one's
files and dtypes, at α = 1 its bytes; arithmetic is in fp32, tensors are streamed, one candidate at a time is in memory.
Data: any labelled records, or text. Measured: accuracy (of classes or of tokens) and cross-entropy in nats; the run's
curves hold both over the α. Errors: MismatchError before any weight is read; CorruptError naming a tensor that holds a
NaN or an infinity; DataError for records that set the model no task.

    lfm run reuse.wise_ft base=base model=tuned data=held-out.jsonl --set by=loss --out between
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import lfm.core
from lfm.core import Codec, Cost, Data, DataSlot, Inputs, Logits, Meta, Method, Model, Run, Sizes, Slot, Weights
from lfm.tensors import match
from lfm.tensors.lazy import map_tensors
from lfm.tensors.match import floating, same
from lfm.train.examine import Criterion, Score, examiner

if TYPE_CHECKING:
    from torch import Tensor

Alpha = Annotated[float, Meta(ge=0, le=1)]


class Config(lfm.core.Config, frozen=True):
    alphas: Annotated[tuple[Alpha, ...], Meta(min_length=1, description="α that are tried; 0 and 1 always are")] = (
        0.1,
        0.2,
        0.3,
        0.4,
        0.5,
        0.6,
        0.7,
        0.8,
        0.9,
    )
    alpha: Annotated[Alpha | None, Meta(description="the α to keep; null: the best on the data")] = None
    by: Annotated[Criterion, Meta(description="what best means: accuracy (then loss), or loss")] = "accuracy"


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    base, model = inputs.model("base"), inputs.model("model")
    before, weights = base.ask(Weights).tensors(), model.ask(Weights)
    after = weights.tensors()
    names = floating(after)
    same(after.keys() - set(names), (model, base))

    def at(alpha: float) -> Model:
        if alpha == 1:
            return model

        def between(name: str, start: Tensor, end: Tensor) -> Tensor:
            return start.lerp(end, alpha)

        return weights.replace(map_tensors(names, between, [before, after], like=after))

    exams = {role: examiner(inputs.records(role), model) for role in ("data", "shifted") if inputs.records(role)}

    def measure(alpha: float) -> dict[str, list[float]]:
        logits = (base if alpha == 0 else at(alpha)).ask(Logits).logits
        return {role: list(exam(logits)) for role, exam in exams.items()}

    swept: list[float] = sorted({0.0, 1.0, *config.alphas, *([] if config.alpha is None else [config.alpha])})
    found: dict[float, dict[str, Score]] = {}
    for alpha in run.track(swept, "α"):
        told = run.step(f"alpha-{alpha}", lambda alpha=alpha: measure(alpha))
        found[alpha] = {role: Score(*numbers) for role, numbers in told.items()}
        for role, score in found[alpha].items():
            for quantity, value in score._asdict().items():
                run.curve(f"{quantity} on {role}, by α", value)
    best = config.alpha
    if best is None:
        best = 1.0  # of equals the nearest to the fine-tuned model stays
        for alpha in reversed(swept):
            if found[alpha]["data"].beats(found[best]["data"], config.by):
                best = alpha
    run.note(alpha=best)
    for alpha, where in ((0.0, "base"), (1.0, "tuned"), (best, "kept")):
        for role, score in found[alpha].items():
            run.note(**{f"{role}_{quantity}_{where}": value for quantity, value in score._asdict().items()})
    return at(best)


def agree(config: Config, inputs: Inputs) -> None:
    match.agree([inputs.model("model"), inputs.model("base")])


def cost(config: Config, sizes: Sizes) -> Cost:
    model, tokens = sizes.model("model"), sum(amount.tokens for amount in sizes.data.values())
    count = len(config.alphas) + 2
    return Cost(
        flops=count * model.parameters * (4.0 + 2.0 * tokens),
        steps=count * (1 + sum(amount.records for amount in sizes.data.values()) // 64),
        memory=12 * model.parameters,
        disk=model.bytes,
    )


RECORDS = ("text", "completion", "label", "pair", "image", "fact")

METHOD = Method(
    paper="arXiv:2109.01903",
    config=Config,
    models={
        "base": Slot((Weights, Logits), help="what the model was fine-tuned from"),
        "model": Slot((Weights, Logits, Codec), help="the fine-tuned model"),
    },
    data={
        "data": DataSlot(Data.FEW_SHOT, RECORDS, help="held-out records that α is chosen on"),
        "shifted": DataSlot(Data.FEW_SHOT, RECORDS, optional=True, help="of another distribution: measured only"),
    },
    run=run,
    cost=cost,
    agree=agree,
)
