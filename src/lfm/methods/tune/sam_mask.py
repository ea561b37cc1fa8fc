"""Tune the few parameters that matter most to the loss, chosen in closed form; all others stay bit for bit.

    L(θ + M Δ) ≈ L(θ) + gᵀ M Δ + ½ Δᵀ M H M Δ,  H = h·I   ⇒   min over Δ is L(θ) − 1/(2h) Σ_{i ∈ M} gᵢ²
    M = the p · |θ| places with the largest gᵢ²,  g = ∇L(θ) over the training records

Paper: On the Effectiveness of Parameter-Efficient Fine-Tuning, arXiv 2211.15583: the Second-order Approximation Method
(SAM; no relation to sharpness-aware minimisation). With a diagonal Hessian a place is worth gᵢ²/hᵢ; as in the paper the
hᵢ are taken as equal; p = 0.005 is its choice. Here g is the whole training set's, with dropout off. A classifier's
head, which begins random, is not chosen from but trained as a whole. by=random is a choice that the paper compares
with; by=magnitude takes the largest |θᵢ|.

Models: any with Gradients and a codec. Data: every record kind. Result: a program that holds the changed numbers and
where they are (12 bytes each); `--format checkpoint` writes all weights. Statistics of batch norms stay as they are.
Errors: ConfigError where p comes to no parameter; DivergedError.

    lfm run tune.sam_mask model=base train=train.jsonl --set p=0.01 --out tuned
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lfm.core import Codec, Cost, Gradients, Inputs, Meta, Method, Model, Parts, Run, Sizes, Slot
from lfm.core.errors import ConfigError
from lfm.core.heavy import torch
from lfm.data import task as tasks
from lfm.models import device, forward, layers, local
from lfm.models.program import program
from lfm.train import RECORDS, Fit, fit, once, sparse, suited, training
from lfm.train.batches import Numbers

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch
    from lfm.data.task import Task

ID = "tune.sam_mask"
PLACES, VALUES = "places.", "values."
"""Begin the names of the program's tensors: a parameter's places, and the numbers there."""


class Config(Fit, frozen=True):
    p: Annotated[float, Meta(gt=0, le=1, description="share of the parameters that is tuned")] = 0.005
    by: Annotated[Literal["gradient", "magnitude", "random"], Meta(description="what chooses them")] = "gradient"
    train_head: Annotated[bool, Meta(description="train a classifier's head as well, all of it")] = True
    lr: Annotated[float, Meta(gt=0, description="peak learning rate (AdamW)")] = 1e-3


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    codec = model.ask(Codec)
    train, dev = (tasks.fit(inputs.records(role), codec, model.facts) for role in ("train", "dev"))
    task = tasks.task_for([*train, *dev], codec, model.facts)
    module = model.ask(Gradients).module()
    every, collate = once([*train, *dev], task.collate)
    numbers, beside = Numbers(train), every[len(train) :]

    def batches() -> list[Batch]:
        size = config.batch_size
        return [collate(numbers[i : i + size]) for i in range(0, len(numbers), size)]

    head = set(_head(module)) if config.train_head and model.facts.labels else set()
    body = [name for name, p in module.named_parameters() if name not in head and p.is_floating_point()]
    found = run.step("places", lambda: choose(module, body, task, config, run, batches))
    found |= {name: torch.arange(module.get_parameter(name).numel()) for name in head}
    places = {name: found[name] for name, _ in module.named_parameters() if name in found}  # in the module's order
    held = sparse.chosen(module, places)
    run.note(body=sum(len(found[n]) for n in found if n in body))

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return task.loss(module(batch), batch)

    losses = fit(held, numbers, collate, loss, config, run, dev=beside)
    run.note(loss_before=losses[0], loss_after=losses[-1])
    values = sparse.values_of(held, places)
    tensors = {PLACES + n: where.to(torch.int64) for n, where in places.items()} | {
        VALUES + n: value for n, value in values.items()
    }
    parts = Parts({"model": (model,)}, tensors, {})
    made = program(ID, config, parts, opened)

    def checkpoint(out: Path) -> Model:
        whole = model.ask(Gradients).rewrap(tuned(parts))
        return whole.save(out, "checkpoint")

    return replace(made, formats={**made.formats, "checkpoint": checkpoint}, _opened={})


def choose(
    module: nn.Module,
    names: list[str],
    task: Task,
    config: Config,
    run: Run,
    batches: Callable[[], list[Batch]],
) -> dict[str, Tensor]:
    """Where the best p of these parameters' numbers are."""
    size = sum(module.get_parameter(name).numel() for name in names)
    count = round(config.p * size)
    if not count:
        raise ConfigError(f"p={config.p:g} of {size} parameters is none of them", fix=f"p={1 / size:.1g} or more")
    if config.by == "magnitude":
        return sparse.top({name: module.get_parameter(name).detach().abs() for name in names}, count)
    if config.by == "random":
        random = run.generator("places")
        return sparse.top({n: torch.rand(module.get_parameter(n).shape, generator=random) for n in names}, count)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        logits = forward(module, batch)
        return task.loss(logits, batch) * len(task.scored(logits, batch)[1])  # the sum: batches differ in size

    module.to(device())
    g = sparse.gradient(module, run.track(batches(), "gradient"), loss, names)
    module.cpu()
    return sparse.top({name: value.square() for name, value in g.items()}, count)


def _head(module: nn.Module) -> list[str]:
    """The parameters of a classifier's last linear layer."""
    name = layers.last_linear(module)
    return [f"{name}.{key}" for key, _ in module.get_submodule(name).named_parameters()]


def tuned(parts: Parts) -> nn.Module:
    """The part's module with the tuned numbers in it."""

    def named(kind: str) -> dict[str, Tensor]:
        return {name.removeprefix(kind): t for name, t in parts.tensors.items() if name.startswith(kind)}

    return sparse.put(parts.model("model").ask(Gradients).module(), named(PLACES), named(VALUES))


def opened(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The interfaces of the base, with the tuned numbers in it."""
    base = parts.model("model")
    given = local.interfaces(base.facts.task or "module", partial(tuned, parts), lambda: base.ask(Codec))
    return dict(given) | {Codec: lambda: base.ask(Codec)}


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, given = sizes.model("model"), sizes.data["train"]
    tuning = training(config, facts, given, share=config.p)
    search = 6.0 * facts.parameters * given.tokens if config.by == "gradient" else 0.0
    return tuning._replace(
        flops=tuning.flops + search,
        memory=max(tuning.memory, 16 * facts.parameters),
        disk=int(12 * config.p * facts.parameters),
    )


METHOD = Method(
    paper="arXiv:2211.15583",
    config=Config,
    models={"model": Slot((Gradients, Codec), help="the model to tune")},
    data=RECORDS,
    agree=suited,
    run=run,
    cost=cost,
    open=opened,
    forms=("program", "checkpoint"),
)
