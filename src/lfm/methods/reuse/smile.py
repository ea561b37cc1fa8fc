"""Keep the base and, at every linear layer, the low-rank changes of all models: each token goes where it fits best.

    y = W₀x + b₀ + Σ_{i ∈ top} pᵢ (Uᵢ Σᵢ Vᵢᵀ x + bᵢ − b₀),   p = softmax over models of ‖Vᵢᵀ x‖₂, the top ones rescaled

Paper: SMILE, arXiv 2408.10174: Wᵢ − W₀ = Uᵢ Σᵢ Vᵢᵀ to `rank` directions; an input belongs to the model whose change
reads it most, by the first `gate` of them. Nothing is trained and no data are needed. What is no linear layer (norms,
tables, convolutions) stays the base's, or is averaged with rest=mean. A layer that no model changed is left as it is.

Models: base and models, equal in architecture and vocabulary; of any task, for tokens are routed one by one. The result
is a program over the base that stores the directions: (in + out) · rank + in · gate numbers a layer and model. Errors:
MismatchError before any weight is read.

    lfm run reuse.smile base=base models=a models=b --set rank=8 --out experts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import lfm.core
from lfm.core import Codec, Cost, Gradients, Inputs, Meta, Method, Model, Parts, Run, Sizes, Slot, Weights
from lfm.core.heavy import torch
from lfm.models import device, local
from lfm.models.mixing import load_into, matched, parameters_of
from lfm.models.program import program
from lfm.models.routed import add_changes, low_rank
from lfm.tensors import match
from lfm.tensors.match import floating, same

if TYPE_CHECKING:
    from torch import Tensor, nn


REST = "rest."
"""Begins the names of what is stored of everything but the linear layers."""


class Config(lfm.core.Config, frozen=True):
    rank: Annotated[int, Meta(ge=1, description="directions of each change that are kept")] = 32
    gate: Annotated[int, Meta(ge=1, description="of these, how many an input is measured by")] = 16
    top: Annotated[int, Meta(ge=1, description="models that a token goes to")] = 1
    rest: Annotated[Literal["base", "mean"], Meta(description="what is no linear layer: the base's, or averaged")] = (
        "base"
    )


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    base, models = inputs.model("base"), inputs.all("models")
    stored = base.ask(Weights).tensors()
    same(stored.keys() - set(floating(stored)), (base, *models))
    module = base.ask(Gradients).module()
    before = parameters_of(module)
    tensors = low_rank(module, before, run.track(models, "models"), config.rank, config.gate)
    if config.rest == "mean":
        layers = {key.rpartition(".")[0] for key in tensors}
        names = [name for name in before if name.rpartition(".")[0] not in layers]
        for model in models:
            after = matched(model.ask(Gradients).module(), before, model.ref)
            for name in names:
                total = tensors.setdefault(REST + name, torch.zeros_like(before[name]))
                total += after[name] / len(models)
    return program("reuse.smile", config, Parts({"base": (base,)}, tensors, {}), open)


def shares(x: Tensor, gate: Tensor, top: int) -> Tensor:
    """(rows, N): how much of each model's change a row gets. All but the `top` largest are zero; they sum to 1."""
    told = torch.einsum("ri,ngi->rng", x, gate).norm(dim=-1).softmax(-1)
    best = told.topk(min(top, told.shape[-1]), dim=-1)
    return torch.zeros_like(told).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))


def open(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The interfaces of the program: those of its base, with the changes added where its linear layers answer."""
    base = parts.model("base")

    def built() -> nn.Module:
        module = base.ask(Gradients).module().to(device())
        load_into(module, {k.removeprefix(REST): v for k, v in parts.tensors.items() if k.startswith(REST)})
        changes = {k: v for k, v in parts.tensors.items() if not k.startswith(REST)}
        add_changes(module, changes, lambda here, x: shares(x.reshape(-1, x.shape[-1]), here["gate"], config.top))
        return module

    codec = (lambda: base.ask(Codec)) if base.can(Codec) else None
    return dict(local.interfaces(base.facts.task, built, codec)) | ({Codec: codec} if codec else {})


def agree(config: Config, inputs: Inputs) -> None:
    match.agree([inputs.model("base"), *inputs.all("models")])


def cost(config: Config, sizes: Sizes) -> Cost:
    count, base = len(sizes.models["models"]), sizes.model("base")
    side = max(base.width, 1)
    kept = min(1.0, (2.0 * config.rank + config.gate) / side) * count * base.parameters
    return Cost(
        flops=20.0 * count * side * base.parameters, memory=int(4 * (3 * base.parameters + kept)), disk=int(4 * kept)
    )


METHOD = Method(
    paper="arXiv:2408.10174",
    config=Config,
    models={
        "base": Slot((Weights, Gradients, Codec), help="what the models were fine-tuned from"),
        "models": Slot((Weights, Gradients), max=None, help="fine-tuned models to keep the changes of"),
    },
    run=run,
    cost=cost,
    agree=agree,
    open=open,
)
