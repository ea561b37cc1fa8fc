"""Keep what models share as one merge and what each alone knows at low rank; a router mixes the latter for every input.

    θ_s = θ₀ + λ Σᵢ (θᵢ − θ₀),   vᵢ = SVD_rank(θᵢ − θ_s),   θ(x) = θ_s + Σᵢ wᵢ(x) vᵢ,   w(x) = softmax r(h(x; θ_s))

Paper: Twin-Merging, arXiv 2406.15479. The router, two linear layers with a ReLU, learns from a few inputs of each
model's task to tell whose they are, by the last block's features under the shared weights, averaged over tokens (the
paper reads the last token's). vᵢ are kept of linear layers, biases whole; everything else is the shared merge's.

Models: base and models, equal in architecture and vocabulary. Not for models that read from left to right: features of
all tokens would look ahead. Data: records whose `group` names the model that they belong to, as `groups` lists them in
the models' order; classes are not used. The result is a program over the base; it stores θ_s, the vᵢ and the router,
and runs its module twice. Errors: MismatchError before any weight is read; ConfigError and DataError for groups that do
not fit.

    lfm run reuse.twin base=base models=a models=b data=texts.jsonl --set groups='["a","b"]' --set rank=8 --out experts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

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
from lfm.core.errors import ConfigError, MismatchError
from lfm.core.heavy import F, nn, torch
from lfm.data.shares import batches, shares
from lfm.models import device, forward, local, structure
from lfm.models.mixing import load_into, matched, parameters_of
from lfm.models.program import program
from lfm.models.routed import add_changes, low_rank, token_mean
from lfm.tensors import match
from lfm.tensors.match import floating, same
from lfm.train import Fit, fit

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch

SITE = ("hidden", -1)


class Config(Fit, frozen=True):
    groups: Annotated[
        tuple[str, ...], Meta(description="the records' group that belongs to each model, in the models' order")
    ] = ()
    scale: Annotated[float, Meta(description="λ of the shared merge")] = 0.3
    rank: Annotated[int, Meta(ge=1, description="directions kept of what each model alone knows")] = 32
    epochs: Annotated[float, Meta(gt=0, description="router: passes over the records")] = 10.0
    batch_size: Annotated[int, Meta(ge=1, description="router: records a batch")] = 64


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    base, models = inputs.model("base"), inputs.all("models")
    stored = base.ask(Weights).tensors()
    same(stored.keys() - set(floating(stored)), (base, *models))
    module = base.ask(Gradients).module()
    before = {name: value.clone() for name, value in parameters_of(module).items()}
    shared = {name: value.clone() for name, value in before.items()}
    for model in models:
        for name, value in matched(model.ask(Gradients).module(), before, model.ref).items():
            shared[name] += config.scale * (value - before[name])
    changes = low_rank(module, shared, run.track(models, "models"), config.rank)
    load_into(module, shared).to(device())
    records = shares(inputs.records("data"), config.groups, len(models))
    read = [
        run.step(f"features-{i}", lambda r=r: features(module, batches(base, r, 64))) for i, r in enumerate(records)
    ]
    whole = torch.cat(read)
    owners = torch.cat([torch.full((len(part),), i) for i, part in enumerate(read)])
    router = build(whole.shape[1], len(models), run.generator("router"))

    def collate(chosen: Sequence[int]) -> Batch:
        return {"features": whole[list(chosen)], "owner": owners[list(chosen)]}

    def loss(router: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(router(batch["features"]), batch["owner"])

    losses = fit(router, range(len(whole)), collate, loss, config, run, name="router")
    with torch.no_grad():
        right = (router(whole).argmax(-1) == owners).double().mean().item()
    run.note(router_loss=losses[-1], router_accuracy=right)
    tensors = {f"shared/{name}": value for name, value in shared.items()}
    tensors |= {f"change/{name}": value for name, value in changes.items()}
    tensors |= {f"router/{name}": value.detach().cpu() for name, value in router.state_dict().items()}
    return program("reuse.twin", config, Parts({"base": (base,)}, tensors, {}), open)


def build(width: int, count: int, random: torch.Generator) -> nn.Sequential:
    """The router, untrained."""
    made = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, count))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, width**-0.5 if parameter.ndim > 1 else 0.0, generator=random)
    return made


def features(module: nn.Module, given: Sequence[Batch]) -> Tensor:
    """(n, width) on the CPU: the last block's output, mean over tokens that are no padding."""
    found = []
    for batch in given:
        with torch.no_grad(), structure.watch(module, [SITE]) as seen:
            forward(module, batch)
        mask = batch["attention_mask"].to(seen[0].device) if "attention_mask" in batch else None
        found.append(token_mean(seen[0].float(), mask).cpu())
    return torch.cat(found)


def open(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The interfaces of the program: those of its base, with the mixed module in the base's place."""
    base = parts.model("base")

    def part(kind: str) -> dict[str, Tensor]:
        return {k.split("/", 1)[1]: v for k, v in parts.tensors.items() if k.startswith(kind + "/")}

    def built() -> nn.Module:
        module = load_into(base.ask(Gradients).module(), part("shared")).to(device())
        kept = part("router")
        router = build(kept["0.weight"].shape[1], len(kept["2.bias"]), torch.Generator())
        router.load_state_dict(kept)
        _mix(module, router.to(device()).requires_grad_(False), part("change"))
        return module

    codec = (lambda: base.ask(Codec)) if base.can(Codec) else None
    return dict(local.interfaces(base.facts.task, built, codec)) | ({Codec: codec} if codec else {})


def _mix(module: nn.Module, router: nn.Module, changes: Mapping[str, Tensor]) -> None:
    """Before each forward the module is run without the changes, and what it saw says how much of each is added."""
    now: dict[str, Any] = {"looking": False, "shares": None}

    def begin(module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        if now["looking"]:
            return
        now.update(looking=True, shares=None)
        try:
            with structure.watch(module, [SITE]) as seen:
                module(*args, **given)
        finally:
            now["looking"] = False
        now["shares"] = router(token_mean(seen[0].float(), given.get("attention_mask"))).softmax(-1)

    def told(here: Mapping[str, Tensor], x: Tensor) -> Tensor:
        rows, mixed = x.numel() // x.shape[-1], now["shares"]
        if mixed is None:
            return x.new_zeros(rows, len(here["write"]))
        return mixed[:, None].expand(-1, rows // len(mixed), -1).reshape(rows, -1)

    module.register_forward_pre_hook(begin, with_kwargs=True)
    add_changes(module, changes, told)


def agree(config: Config, inputs: Inputs) -> None:
    base = inputs.model("base")
    if base.facts.task in ("causal-lm", "seq2seq-lm"):
        raise MismatchError(
            "reuse.twin routes an input by all of its tokens",
            why=f"{base.ref} is a {base.facts.task}, to which later tokens must stay unknown",
            fix="give classifiers, masked models or image models; reuse.smile routes token by token",
        )
    if not config.groups:
        raise ConfigError("the router learns which records belong to which model", fix="set groups, one name a model")
    shares(inputs.records("data"), config.groups, len(inputs.all("models")))
    match.agree([base, *inputs.all("models")])


def cost(config: Config, sizes: Sizes) -> Cost:
    count, base, amount = len(sizes.models["models"]), sizes.model("base"), sizes.data["data"]
    side = max(base.width, 1)
    kept = min(1.0, 2.0 * config.rank / side) * count * base.parameters + base.parameters
    return Cost(
        flops=20.0 * count * side * base.parameters + 2.0 * base.parameters * amount.tokens,
        steps=int(config.epochs * (1 + amount.records // config.batch_size)) + 1 + amount.records // 64,
        memory=int(4 * (4 * base.parameters + kept)),
        disk=int(4 * kept),
    )


METHOD = Method(
    paper="arXiv:2406.15479",
    config=Config,
    models={
        "base": Slot((Weights, Gradients, Codec), help="what the models were fine-tuned from"),
        "models": Slot((Weights, Gradients), max=None, help="fine-tuned models to merge"),
    },
    data={
        "data": DataSlot(
            Data.UNLABELED,
            ("text", "label", "pair", "image", "fact", "completion"),
            help="inputs of each model's task, grouped",
        )
    },
    run=run,
    cost=cost,
    agree=agree,
    open=open,
)
