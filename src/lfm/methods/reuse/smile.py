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
from lfm.models.structure import linears, transposed
from lfm.tensors import match
from lfm.tensors.match import floating, same

if TYPE_CHECKING:
    from torch import Tensor, nn


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
    turned = {name: transposed(layer) for name, layer, *_ in linears(module) if f"{name}.weight" in before}
    kept: dict[str, list[Tensor]] = {}
    for model in run.track(models, "models"):
        after = matched(model.ask(Gradients).module(), before, model.ref)
        for name, value in after.items():
            layer, _, part = name.rpartition(".")
            if layer in turned and part == "weight":
                for key, found in directions(value - before[name], turned[layer], config).items():
                    kept.setdefault(f"{layer}.{key}", []).append(found)
            elif layer in turned:
                kept.setdefault(f"{layer}.bias", []).append(value - before[name])
            elif config.rest == "mean":
                total = kept.setdefault(f"rest.{name}", [torch.zeros_like(value)])
                total[0] += value / len(models)
    tensors = {k: v[0] if k.startswith("rest.") else torch.stack(v).contiguous() for k, v in kept.items()}
    return program("reuse.smile", config, Parts({"base": (base,)}, tensors, {}), open)


def directions(change: Tensor, turned: bool, config: Config) -> dict[str, Tensor]:
    """write (out, rank) and read (rank, in), whose product is the best approximation; gate (gate, in), orthonormal."""
    u, s, v = torch.linalg.svd(change.T if turned else change, full_matrices=False)
    gate = v[: config.gate] * (s[: config.gate, None] > 0)  # an unchanged layer calls for nothing
    return {"write": u[:, : config.rank], "read": s[: config.rank, None] * v[: config.rank], "gate": gate}


def shares(x: Tensor, gate: Tensor, top: int) -> Tensor:
    """(rows, N): how much of each model's change a row gets. All but the `top` largest are zero; they sum to 1."""
    told = torch.einsum("ri,ngi->rng", x, gate).norm(dim=-1).softmax(-1)
    best = told.topk(min(top, told.shape[-1]), dim=-1)
    return torch.zeros_like(told).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))


def open(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The interfaces of the program: those of its base, with the changes added where its linear layers answer."""
    base = parts.model("base")

    def built() -> nn.Module:
        module = base.ask(Gradients).module()
        load_into(module, {k.removeprefix("rest."): v for k, v in parts.tensors.items() if k.startswith("rest.")})
        for name in {key.rpartition(".")[0] for key in parts.tensors if not key.startswith("rest.")}:
            here = {key: parts.tensors.get(f"{name}.{key}") for key in ("write", "read", "gate", "bias")}
            here = {key: value.to(device()) for key, value in here.items() if value is not None}
            module.get_submodule(name).register_forward_hook(_adding(here, config.top))
        return module

    codec = (lambda: base.ask(Codec)) if base.can(Codec) else None
    return dict(local.interfaces(base.facts.task, built, codec)) | ({Codec: codec} if codec else {})


def _adding(here: Mapping[str, Tensor], top: int) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        rows = args[0].reshape(-1, args[0].shape[-1])
        given = shares(rows, here["gate"], top)
        more = torch.zeros(len(rows), out.shape[-1], dtype=out.dtype, device=out.device)
        for place in range(given.shape[1]):
            taken = given[:, place].nonzero()[:, 0]
            if len(taken):
                answer = rows[taken] @ here["read"][place].T @ here["write"][place].T
                if "bias" in here:
                    answer = answer + here["bias"][place]
                more.index_add_(0, taken, given[taken, place, None] * answer)
        return out + more.reshape(out.shape)

    return hook


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
