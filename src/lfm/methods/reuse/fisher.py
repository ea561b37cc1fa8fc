"""Average weights with each parameter weighed by how much its model's answers depend on it.

    θ = Σᵢ wᵢ Fᵢ θᵢ / Σᵢ wᵢ Fᵢ,    Fᵢ = E_x E_{y ~ pᵢ(y|x)} (∂ log pᵢ(y|x) / ∂θ)² / ‖·‖₂ + floor

Paper: Fisher-weighted averaging, arXiv 2111.09832. The diagonal is exact for classes (`answers` expected), by one drawn
answer a record for everything else, or empirical (given); examples are taken one at a time, since a batch's summed
gradient, squared, holds products between examples that are no part of it. `normalize` divides each model's diagonal by
its norm, as the authors do, so that a model with unsure answers does not outweigh the others; `floor` then makes the
plain mean of what no answer depends on. Buffers (running means) are averaged.

Models: two or more, equal in architecture and vocabulary. Data: records of any kind with a task; classes are used only
by answers=given; with `groups` model i reads the records of group i, without it all read all. A module, two sums and a
diagonal are in memory, however many the models. Errors: MismatchError before any weight is read; ConfigError for
answers=expected where a record has more than one answer, or for groups that do not fit the models.

    lfm run reuse.fisher models=a models=b data=texts.jsonl --set examples=64 --out merged
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import lfm.core
from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot, Weights
from lfm.core.errors import ConfigError
from lfm.core.heavy import torch
from lfm.data import task as tasks
from lfm.data.shares import classless, shares
from lfm.models import device
from lfm.models.mixing import load_into, matched, parameters_of
from lfm.tensors import match
from lfm.tensors.match import floating, same
from lfm.train.fisher import CLASSES, Answers, fisher_diagonal

if TYPE_CHECKING:
    from torch import Tensor


class Config(lfm.core.Config, frozen=True):
    answers: Annotated[Answers, Meta(description="gradients of every class, of one drawn, or of the record's")] = (
        "expected"
    )
    groups: Annotated[
        tuple[str, ...], Meta(description="the records' group that each model reads, in order; empty: all read all")
    ] = ()
    examples: Annotated[int, Meta(ge=1, description="records a model, at most: its first")] = 64
    weights: Annotated[
        tuple[Annotated[float, Meta(ge=0)], ...], Meta(description="one a model, in their order; empty: all equal")
    ] = ()
    normalize: Annotated[bool, Meta(description="divide each model's diagonal by its norm")] = True
    floor: Annotated[float, Meta(gt=0, description="added to every entry of a diagonal")] = 1e-6


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    models, weights = inputs.all("models"), _weights(config, len(inputs.all("models")))
    stored = models[0].ask(Weights).tensors()
    same(stored.keys() - set(floating(stored)), models)
    gradients = models[0].ask(Gradients)
    shell = gradients.module()
    like = parameters_of(shell)
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in like.items()}
    mass = {name: torch.zeros_like(value) for name, value in total.items()}
    for place, records in enumerate(run.track(_shares(config, inputs), "models")):
        model = models[place]
        mine = {name: value.double() for name, value in matched(model.ask(Gradients).module(), like, model.ref).items()}
        if not weights[place]:
            continue
        found = run.step(f"fisher-{place}", lambda m=model, r=records, p=place: _diagonal(m, r, p, config, run))
        norm = sum(float(value.double().square().sum()) for value in found.values()) ** 0.5
        run.note(**{f"norm_{place + 1}": norm})
        for name, value in mine.items():
            share = found[name].double() if name in found else torch.ones_like(value)
            if config.normalize and name in found and norm:
                share = share / norm
            share = weights[place] * (share + config.floor)
            total[name] += share * value
            mass[name] += share
    merged = {name: (total[name] / mass[name]).float() for name in total}
    return gradients.rewrap(load_into(shell, merged))


def _diagonal(model: Model, records: Sequence[Any], place: int, config: Config, run: Run) -> dict[str, Tensor]:
    codec = model.ask(Codec)
    kept = records[: config.examples]
    kept = tasks.fit(kept if config.answers == "given" else classless(kept, model), codec, model.facts)
    task = tasks.task_for(kept, codec, model.facts)
    module = model.ask(Gradients).module().to(device())
    examples = (task.collate([record]) for record in run.track(kept, f"model {place + 1}", len(kept)))
    random = run.generator("answers", place)
    return {n: f.float() for n, f in fisher_diagonal(module, examples, task, config.answers, random).items()}


def _shares(config: Config, inputs: Inputs) -> list[Sequence[Any]]:
    return shares(inputs.records("data"), config.groups, len(inputs.all("models")))


def _weights(config: Config, count: int) -> list[float]:
    weights = list(config.weights) or [1.0] * count
    if len(weights) != count:
        raise ConfigError(f"weights has {len(weights)} values for {count} models", fix="give one a model, in order")
    if not any(weights):
        raise ConfigError("all weights are zero", fix="leave out the models that should not count")
    return weights


def agree(config: Config, inputs: Inputs) -> None:
    models = inputs.all("models")
    _weights(config, len(models))
    _shares(config, inputs)
    match.agree(models)
    if config.answers == "expected" and not 0 < len(models[0].facts.labels) <= CLASSES:
        raise ConfigError(
            "an expectation over all answers is for models with a head of few classes",
            why=f"{models[0].ref} has {len(models[0].facts.labels) or 'no'} classes",
            fix="answers=sampled",
        )


def cost(config: Config, sizes: Sizes) -> Cost:
    models, amount = sizes.models["models"], sizes.data["data"]
    model, count = models[0], len(models)
    read = count * min(config.examples, amount.records)
    backward = max(1, len(model.labels)) if config.answers == "expected" else 1
    return Cost(
        flops=read * amount.tokens / max(amount.records, 1) * model.parameters * (2.0 + 4.0 * backward),
        steps=read * (1 + 2 * backward),
        memory=40 * model.parameters,
        disk=model.bytes + 4 * count * model.parameters,
    )


METHOD = Method(
    paper="arXiv:2111.09832",
    config=Config,
    models={"models": Slot((Weights, Gradients, Codec), min=2, max=None, help="models to merge")},
    data={
        "data": DataSlot(
            Data.UNLABELED,
            ("text", "completion", "label", "pair", "image", "fact"),
            help="what the models' answers are differentiated on",
        )
    },
    run=run,
    cost=cost,
    agree=agree,
)
