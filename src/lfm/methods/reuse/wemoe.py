"""Merge what models share, and mix their feed-forward layers anew for every input by small routers.

    W(x) = W₀ + Σᵢ λᵢ(x) (Wᵢ − W₀) in each block's feed-forward layer,   λ(x) = mean over tokens of r(h)
    θ = θ₀ + λ Σᵢ (θᵢ − θ₀) elsewhere;   r trained to minimise E_x H(p(· | x)) − `diversity` · H(E_x p(· | x))

Paper: Weight-Ensembling Mixture of Experts, arXiv 2402.00433. A router is two linear layers with a ReLU, begun so that
it says `start` of every model. Differs: λ are of each input by itself (not of the batch, as the authors' default has
it), so that an answer does not depend on what it was asked along with; a step's batch is drawn from all records
together; and a batch's mean answer is kept diverse (2002.08546; diversity=0 is the paper's), for where all tasks share
one head routers learn to give everything one sure answer: on the zoo's eight experts .688 without it, .798 with. (Fewer
steps at a higher rate than the authors' 1000 at 1e-4; a router that knew each image's task would reach .858 there.)

Models: base and models, equal in architecture and vocabulary, with blocks whose feed-forward layer is found by
structure. Not for models that read from left to right: a mean over tokens would look ahead. Data: unlabelled records.
The result is a program over base and models, which it keeps in memory (feed-forward layers N + 1 times); it stores the
routers. Errors: MismatchError before any weight is read; ModelError where no blocks are found; DivergedError.

    lfm run reuse.wemoe base=base models=a models=b data=texts.jsonl --set steps=60 --out experts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lfm.core import (
    Codec,
    Cost,
    Data,
    DataSlot,
    Gradients,
    Inputs,
    Meta,
    Method,
    Model,
    Parts,
    Run,
    Sizes,
    Slot,
    Weights,
)
from lfm.core.errors import MismatchError
from lfm.core.heavy import torch
from lfm.data import task as tasks
from lfm.data.shares import classless
from lfm.models import device, forward, local
from lfm.models.program import program
from lfm.models.routed import routed, routers
from lfm.tensors import match
from lfm.tensors.match import floating, same
from lfm.train import Fit, fit, once
from lfm.train.fit import steps_of
from lfm.train.losses import entropy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch


class Config(Fit, frozen=True):
    start: Annotated[float, Meta(description="λ of the layers that are merged once, and the routers' first answer")] = (
        0.3
    )
    steps: Annotated[int, Meta(ge=0, description="optimizer steps; 0: as many as `epochs` asks")] = 200
    batch_size: Annotated[int, Meta(ge=1, description="records a batch, of all tasks together")] = 64
    lr: Annotated[float, Meta(gt=0, description="learning rate of the routers")] = 3e-4
    diversity: Annotated[
        float, Meta(ge=0, description="weight of the entropy of a batch's mean answer, which is kept high")
    ] = 1.0
    weight_decay: Annotated[float, Meta(ge=0, description="decay of the routers' matrices")] = 0.0
    warmup: Annotated[float, Meta(ge=0, lt=1, description="share of the steps in which the rate rises")] = 0.0
    schedule: Annotated[Literal["cosine", "linear", "constant"], Meta(description="how the rate falls")] = "constant"
    clip: Annotated[float, Meta(ge=0, description="largest norm of the gradient; 0: any")] = 0.0


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    base, models = inputs.model("base"), inputs.all("models")
    stored = base.ask(Weights).tensors()
    same(stored.keys() - set(floating(stored)), (base, *models))
    gates = routers(base.ask(Gradients).module(), len(models), config.start, run.generator("routers"))
    module = routed(base, models, gates, config.start)
    codec = base.ask(Codec)
    records = tasks.fit(classless(inputs.records("data"), base), codec, base.facts)
    task = tasks.task_for(records, codec, base.facts)
    numbers, collate = once(records, task.collate)

    def unsure(_: nn.Module, batch: Batch) -> Tensor:
        return entropy(task.scored(forward(module, batch), batch)[0], config.diversity)

    entropies = fit(gates, numbers, collate, unsure, config, run, name="entropy")
    if entropies:
        run.note(entropy_before=entropies[0], entropy_after=entropies[-1])
    parts = Parts({"base": (base,), "models": models}, {k: v.detach().cpu() for k, v in gates.state_dict().items()}, {})
    return program("reuse.wemoe", config, parts, open)


def open(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The interfaces of the program: those of its base, with the routed module in the base's place."""
    base, models = parts.model("base"), parts.models["models"]

    def built() -> nn.Module:
        gates = routers(base.ask(Gradients).module(), len(models), config.start, torch.Generator())
        gates.load_state_dict(dict(parts.tensors))
        return routed(base, models, gates.to(device()).requires_grad_(False), config.start)

    codec = (lambda: base.ask(Codec)) if base.can(Codec) else None
    gives = dict(local.interfaces(base.facts.task, built, codec))
    return gives | ({Codec: codec} if codec else {})


def agree(config: Config, inputs: Inputs) -> None:
    base = inputs.model("base")
    if base.facts.task in ("causal-lm", "seq2seq-lm"):
        raise MismatchError(
            "reuse.wemoe routes an input by the mean over its tokens",
            why=f"{base.ref} is a {base.facts.task}, to which later tokens must stay unknown",
            fix="give classifiers, masked models or image models",
        )
    match.agree([base, *inputs.all("models")])


def cost(config: Config, sizes: Sizes) -> Cost:
    base, count, amount = sizes.model("base"), len(sizes.models["models"]), sizes.data["data"]
    steps = steps_of(config, max(amount.records, 1))
    batch = min(config.batch_size, amount.records)
    tokens = batch * amount.tokens / max(amount.records, 1)
    return Cost(
        flops=steps * base.parameters * (8.0 * tokens + 4.0 * batch * count),
        steps=steps,
        memory=4 * (count + 4 + batch) * base.parameters,
        disk=4 * base.layers * base.width * (base.width + count),
    )


METHOD = Method(
    paper="arXiv:2402.00433",
    config=Config,
    models={
        "base": Slot((Weights, Gradients, Codec), help="what the models were fine-tuned from"),
        "models": Slot((Weights, Gradients), max=None, help="fine-tuned models to merge"),
    },
    data={
        "data": DataSlot(
            Data.UNLABELED,
            ("text", "label", "pair", "image", "fact", "completion"),
            help="what the routers are trained on",
        )
    },
    run=run,
    cost=cost,
    agree=agree,
    open=open,
)
