"""Average the weights of several fine-tunings of one model: of all, of those that help, or as learned.

    uniform   θ = 1/N Σᵢ θᵢ
    greedy    best first: i joins the soup S if mean(S ∪ {i}) is no worse on the held-out data than mean(S)
    learned   θ = Σᵢ αᵢ θᵢ,  α = softmax(a) by gradient on the held-out data; `by_layer`: for each parameter tensor

Paper: Model soups, arXiv 2203.05482. Greedy keeps a running mean, so that a model is read once when it is measured and
once when it is tried, and two are in memory; it needs no more however many there are. Learned holds all N in memory in
fp32; the paper also learns a temperature of the logits, which is left out here, and optimizes with AdamW as here. With
greedy the result is never worse on the data than the best single model; with the others it may be. The uniform soup
needs no data but to be measured: reuse.linear makes it without, and streams tensors.

Models: two or more, equal in architecture and vocabulary, one head for all. The result has the first one's files and
dtypes. Data: held-out records, any kind with a task. Measured: accuracy (of classes or of tokens) and cross-entropy in
nats. Errors: MismatchError before any weight is read; DataError for records that set the model no task; DivergedError.

    lfm run reuse.soup models=a models=b models=c data=held-out.jsonl --set recipe=greedy --out soup
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot, Weights
from lfm.core.heavy import nn, torch
from lfm.data import task as tasks
from lfm.models import device, forward
from lfm.models.mixing import forward_with, load_into, matched, mixed, parameters_of, stacked
from lfm.tensors import match
from lfm.tensors.match import floating, same
from lfm.train import Fit, fit, once
from lfm.train.examine import Criterion, Score, examiner
from lfm.train.fit import steps_of

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch


class Config(Fit, frozen=True):
    recipe: Annotated[Literal["uniform", "greedy", "learned"], Meta(description="which models go in, and how much")] = (
        "greedy"
    )
    by: Annotated[Criterion, Meta(description="what greedy means by worse and best")] = "accuracy"
    by_layer: Annotated[bool, Meta(description="learned: weights of their own for each parameter tensor")] = False
    epochs: Annotated[float, Meta(gt=0, description="learned: passes over the records")] = 5.0
    lr: Annotated[float, Meta(gt=0, description="learned: rate of the mixing logits a")] = 0.05
    weight_decay: Annotated[float, Meta(ge=0, description="learned: decay of the mixing logits towards equal")] = 0.0


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    models = inputs.all("models")
    stored = models[0].ask(Weights).tensors()
    same(stored.keys() - set(floating(stored)), models)
    gradients = models[0].ask(Gradients)
    shell = gradients.module().to(device()).requires_grad_(False)
    exam = examiner(inputs.records("data"), models[0])

    def measure(tensors: dict[str, Tensor]) -> Score:
        return exam(lambda batch: forward(load_into(shell, tensors), batch))

    like = {name: value.cpu().clone() for name, value in parameters_of(shell).items()}

    def read(place: int) -> dict[str, Tensor]:
        return matched(models[place].ask(Gradients).module(), like, models[place].ref)

    def score(place: int) -> Score:
        return Score(*run.step(f"model-{place}", lambda: list(measure(read(place)))))

    alone = [score(place) for place in run.track(range(len(models)), "models alone")]
    best = 0
    for place, found in enumerate(alone):
        best = place if found.beats(alone[best], config.by) else best
    if config.recipe == "learned":
        soup = _learned(config, inputs, run, shell, like)
    elif config.recipe == "uniform":
        soup = _mean(run, read, list(range(len(models))))
    else:
        soup = _greedy(config, run, read, measure, alone)
    reached = measure(soup)
    run.note(accuracy=reached.accuracy, loss=reached.loss, best=models[best].ref)
    run.note(best_accuracy=alone[best].accuracy, best_loss=alone[best].loss)
    return gradients.rewrap(load_into(shell, soup))


def _mean(run: Run, read: Any, places: list[int]) -> dict[str, Tensor]:
    """The running mean of these models, in their order."""
    mean: dict[str, Tensor] = {}
    for count, place in enumerate(run.track(places, "averaging"), start=1):
        mean = joined(mean, read(place), count)
    return mean


def joined(mean: dict[str, Tensor], model: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The mean of `count` models from that of the others and the last."""
    if count == 1:
        return {name: value.clone() for name, value in model.items()}
    return {name: value + (model[name] - value) / count for name, value in mean.items()}


def _greedy(config: Config, run: Run, read: Any, measure: Any, alone: list[Score]) -> dict[str, Tensor]:
    def rank(place: int) -> tuple[float, ...]:
        score = alone[place]
        return (score.loss,) if config.by == "loss" else (-score.accuracy, score.loss)

    order = sorted(range(len(alone)), key=rank)
    soup, chosen, reached = joined({}, read(order[0]), 1), [order[0]], alone[order[0]]
    run.curve(config.by, getattr(reached, config.by))
    for place in run.track(order[1:], "greedy soup"):
        tried = joined(soup, read(place), len(chosen) + 1)
        found = Score(*run.step(f"with-{place}", lambda tried=tried: list(measure(tried))))
        no_worse = found.loss <= reached.loss if config.by == "loss" else found.accuracy >= reached.accuracy
        if no_worse:
            soup, reached = tried, found
            chosen.append(place)
        run.curve(config.by, getattr(reached, config.by))
    run.note(chosen=", ".join(str(place + 1) for place in chosen))
    return soup


def _learned(config: Config, inputs: Inputs, run: Run, shell: nn.Module, like: dict[str, Tensor]) -> dict[str, Tensor]:
    models = inputs.all("models")
    codec = models[0].ask(Codec)
    records = tasks.fit(inputs.records("data"), codec, models[0].facts)
    task = tasks.task_for(records, codec, models[0].facts)
    numbers, collate = once(records, task.collate)
    stack = {name: value.to(device()) for name, value in stacked(models, like).items()}
    logits = torch.zeros(len(like) if config.by_layer else 1, len(models))
    mixing = nn.ParameterDict({"logits": nn.Parameter(logits)})

    def mixture(mixing: nn.Module) -> dict[str, Tensor]:
        weights = cast("Tensor", mixing["logits"]).softmax(-1)  # type: ignore[index]
        return mixed(stack, lambda place, name: weights[place if config.by_layer else 0])

    def loss(mixing: nn.Module, batch: Batch) -> Tensor:
        return task.loss(forward_with(shell, mixture(mixing), batch), batch)

    fit(mixing, numbers, collate, loss, config, run, name="mixing")
    mean = mixing["logits"].detach().softmax(-1).mean(0)
    run.note(weights=", ".join(f"{weight:.3f}" for weight in mean.tolist()))
    with torch.no_grad():
        return {name: value.cpu() for name, value in mixture(mixing.to(device())).items()}


def agree(config: Config, inputs: Inputs) -> None:
    match.agree(inputs.all("models"))


def cost(config: Config, sizes: Sizes) -> Cost:
    models, amount = sizes.models["models"], sizes.data["data"]
    model, count = models[0], len(models)
    flops = 2.0 * model.parameters * amount.tokens * (2 * count + 1)
    steps, held = (2 * count + 1) * (1 + amount.records // 64), 5
    if config.recipe == "learned":
        more = steps_of(config, max(amount.records, 1))
        tokens = min(config.batch_size, amount.records) * amount.tokens / max(amount.records, 1)
        flops += more * model.parameters * (4 * count + 6 * tokens)
        steps, held = steps + more, 2 * count + 5
    return Cost(flops=flops, steps=steps, memory=4 * held * model.parameters, disk=model.bytes)


METHOD = Method(
    paper="arXiv:2203.05482",
    config=Config,
    models={"models": Slot((Weights, Gradients, Codec), min=2, max=None, help="fine-tunings of one model")},
    data={
        "data": DataSlot(
            Data.FEW_SHOT,
            ("text", "completion", "label", "pair", "image", "fact"),
            help="held-out records: greedy and learned choose on them",
        )
    },
    run=run,
    cost=cost,
    agree=agree,
)
