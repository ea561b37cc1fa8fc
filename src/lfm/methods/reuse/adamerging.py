"""Merge fine-tuned models in the proportions that make the result surest of its answers to unlabelled data.

    θ(λ) = θ₀ + Σᵢ λᵢ (θᵢ − θ₀),    λ ← λ − η ∂/∂λ E_x H(p_θ(λ)(· | x))

Paper: AdaMerging, arXiv 2310.02575. by=tensor is its layer-wise form, a λ for each model and parameter tensor; by=task
has a λ for each model. They begin at `start`. Differs: the paper draws a batch from each task for a step, here a step's
batch is drawn from all records together, and the merged model has one head, which is merged like everything else.

Models: base and models, equal in architecture and vocabulary; any module with gradients. Data: unlabelled records; of
text, the entropy is that of every scored token. In memory: the base, all models in fp32 and a mixture. The result has
the base's files and dtypes. Entropy is not accuracy: what a merged model is wrong about it becomes surer of, so with
more steps or a higher rate a few answers take over (on the zoo's eight experts .759 at the default rate, .710 at three
times that). `diversity` (2002.08546; not in the paper) keeps a batch's answers from becoming all alike: with 1, and
three times the rate, .782. It suits classes that are about as frequent. Errors: MismatchError before any weight is
read; DivergedError.

    lfm run reuse.adamerging base=base models=a models=b data=texts.jsonl --set steps=100 --out merged
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, cast

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot, Weights
from lfm.core.heavy import nn, torch
from lfm.data import task as tasks
from lfm.data.shares import classless
from lfm.models import device
from lfm.models.mixing import forward_with, load_into, mixed, parameters_of, stacked
from lfm.tensors import match
from lfm.tensors.match import floating, same
from lfm.train import Fit, fit, once
from lfm.train.fit import steps_of
from lfm.train.losses import entropy

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch


class Config(Fit, frozen=True):
    by: Annotated[Literal["tensor", "task"], Meta(description="what has a λ of its own: each model's every tensor")] = (
        "tensor"
    )
    start: Annotated[float, Meta(description="every λ at first")] = 0.3
    steps: Annotated[int, Meta(ge=0, description="optimizer steps; 0: as many as `epochs` asks")] = 500
    batch_size: Annotated[int, Meta(ge=1, description="records a batch, of all tasks together")] = 64
    lr: Annotated[float, Meta(gt=0, description="learning rate of the λ")] = 1e-3
    diversity: Annotated[
        float, Meta(ge=0, description="weight of the entropy of a batch's mean answer, which is kept high")
    ] = 0.0
    weight_decay: Annotated[float, Meta(ge=0, description="decay of the λ towards 0")] = 0.0
    warmup: Annotated[float, Meta(ge=0, lt=1, description="share of the steps in which the rate rises")] = 0.0
    schedule: Annotated[Literal["cosine", "linear", "constant"], Meta(description="how the rate falls")] = "constant"
    clip: Annotated[float, Meta(ge=0, description="largest norm of the gradient; 0: any")] = 0.0


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    base, models = inputs.model("base"), inputs.all("models")
    stored = base.ask(Weights).tensors()
    same(stored.keys() - set(floating(stored)), (base, *models))
    gradients, codec = base.ask(Gradients), base.ask(Codec)
    module = gradients.module().to(device()).requires_grad_(False)
    before = {name: value.clone() for name, value in parameters_of(module).items()}
    changes = {name: value.to(device()) for name, value in stacked(models, before).items()}
    for name, value in before.items():
        changes[name] -= value
    records = tasks.fit(classless(inputs.records("data"), base), codec, base.facts)
    task = tasks.task_for(records, codec, base.facts)
    numbers, collate = once(records, task.collate)
    rows = len(before) if config.by == "tensor" else 1
    shares = nn.ParameterDict({"λ": nn.Parameter(torch.full((rows, len(models)), config.start))})

    def merged(shares: nn.Module) -> dict[str, Tensor]:
        values = cast("Tensor", shares["λ"])  # type: ignore[index]
        moved = mixed(changes, lambda place, name: values[place if rows > 1 else 0])
        return {name: before[name] + value for name, value in moved.items()}

    def unsure(shares: nn.Module, batch: Batch) -> Tensor:
        logits = forward_with(module, merged(shares), batch)
        return entropy(task.scored(logits, batch)[0], config.diversity)

    entropies = fit(shares, numbers, collate, unsure, config, run, name="entropy")
    if entropies:
        run.note(entropy_before=entropies[0], entropy_after=entropies[-1])
    mean = shares["λ"].detach().mean(0)
    run.note(shares=", ".join(f"{share:.3f}" for share in mean.tolist()))
    with torch.no_grad():
        return gradients.rewrap(load_into(module, merged(shares.to(device()))))


def agree(config: Config, inputs: Inputs) -> None:
    match.agree([inputs.model("base"), *inputs.all("models")])


def cost(config: Config, sizes: Sizes) -> Cost:
    base, count, amount = sizes.model("base"), len(sizes.models["models"]), sizes.data["data"]
    steps = steps_of(config, max(amount.records, 1))
    tokens = min(config.batch_size, amount.records) * amount.tokens / max(amount.records, 1)
    return Cost(
        flops=steps * base.parameters * (4.0 * count + 6.0 * tokens),
        steps=steps,
        memory=4 * (2 * count + 4) * base.parameters,
        disk=base.bytes,
    )


METHOD = Method(
    paper="arXiv:2310.02575",
    config=Config,
    models={
        "base": Slot((Weights, Gradients, Codec), help="what the models were fine-tuned from"),
        "models": Slot((Weights, Gradients), max=None, help="fine-tuned models to merge"),
    },
    data={
        "data": DataSlot(
            Data.UNLABELED,
            ("text", "completion", "label", "pair", "image", "fact"),
            help="what the merged model becomes sure of; classes are not used",
        )
    },
    run=run,
    cost=cost,
    agree=agree,
)
