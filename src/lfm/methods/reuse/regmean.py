"""Merge each linear layer so that, on its models' own inputs, it answers as they do: by least squares.

    W = (Σᵢ wᵢ Gᵢ)⁻¹ Σᵢ wᵢ Gᵢ Wᵢ,   Gᵢ = XᵢᵀXᵢ / rows, off its diagonal times `scale`     (W is (in, out) here)

Paper: RegMean, arXiv 2212.09849; with inputs=merged RegMean++, 2508.03121, in which the inputs of a block are those
that the merged blocks before it give. All other parameters are averaged, as there. What differs: Grams are in fp64, and
`ridge` (a share of their mean diagonal) leaves the plain mean in directions that no input takes. A layer that the data
do not reach is averaged, and so is a head that is tied to the embeddings.

Models: two or more, equal in architecture and vocabulary. Any linear layer, GPT-2's transposed ones included, the head
unless `head` is false. Data: unlabelled records; with `groups` model i reads the records of group i, which the paper
asks for (each model its own task's data), without it all read all. Two modules' weights, one Gram (in, in) a layer and
their sums are in memory, however many the models. Errors: MismatchError before any weight is read; ConfigError and
DataError for groups that do not fit the models.

    lfm run reuse.regmean models=a models=b data=texts.jsonl --set scale=0.9 --out merged
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import lfm.core
from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot, Weights
from lfm.core.errors import ConfigError
from lfm.core.heavy import torch
from lfm.data.shares import batches, shares
from lfm.models import device, layers
from lfm.models.gram import grams, scaled, solve
from lfm.models.mixing import load_into, matched, parameters_of
from lfm.models.structure import linears, transposed
from lfm.tensors import match
from lfm.tensors.match import floating, same

if TYPE_CHECKING:
    from torch import Tensor, nn

Named = dict[str, "Tensor"]


class Config(lfm.core.Config, frozen=True):
    scale: Annotated[float, Meta(ge=0, le=1, description="what Grams are multiplied by off their diagonals")] = 0.9
    inputs: Annotated[
        Literal["own", "merged"], Meta(description="of whose earlier layers: each model's own, or the merged ones'")
    ] = "own"
    groups: Annotated[
        tuple[str, ...], Meta(description="the records' group that each model reads, in order; empty: all read all")
    ] = ()
    examples: Annotated[int, Meta(ge=1, description="records a model, at most: its first")] = 256
    batch_size: Annotated[int, Meta(ge=1, description="records a batch")] = 32
    weights: Annotated[
        tuple[Annotated[float, Meta(ge=0)], ...], Meta(description="one a model, in their order; empty: all equal")
    ] = ()
    ridge: Annotated[float, Meta(ge=0, description="added to the summed Grams, as a share of their mean diagonal")] = (
        1e-6
    )
    head: Annotated[bool, Meta(description="merge what stands beside the body likewise; else average it")] = True


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    models, weights = inputs.all("models"), _weights(config, len(inputs.all("models")))
    stored = models[0].ask(Weights).tensors()
    same(stored.keys() - set(floating(stored)), models)
    gradients = models[0].ask(Gradients)
    shell = gradients.module()
    like = {name: value.clone() for name, value in parameters_of(shell).items()}
    read = [share[: config.examples] for share in _shares(config, inputs)]
    merged: Named = {}
    stages = _stages(shell, config)
    for number, stage in enumerate(run.track(stages, "layers")):
        earlier = dict(merged) if config.inputs == "merged" else {}

        def stage_of(stage: Stage = stage, earlier: Named = earlier) -> Named:
            return _merged(stage, models, weights, read, like, earlier, config)

        merged |= run.step(f"layers-{number}", stage_of)
    return gradients.rewrap(load_into(shell, merged))


class Stage(NamedTuple):
    """solved: linear layers merged by least squares (`turned`: those that store (in, out)); own: all parameters."""

    solved: list[str]
    own: list[str]
    turned: set[str]


def _stages(module: nn.Module, config: Config) -> list[Stage]:
    """One stage of everything; or what precedes the blocks, each block, and what follows."""
    beside = [] if config.head else layers.heads(module)
    solved = [name for name, *_ in linears(module) if not any(f"{name}.".startswith(f"{b}.") for b in beside)]
    every = list(parameters_of(module))
    solved = [name for name in solved if f"{name}.weight" in every]  # a tied head is not: it is the embeddings
    turned = {name for name in solved if transposed(module.get_submodule(name))}
    if config.inputs == "own":
        return [Stage(solved, every, turned)]
    found = []
    for names in layers.stages(module):
        found.append(
            Stage([n for n in solved if n in names], [n for n in every if n.rpartition(".")[0] in names], turned)
        )
    return found


def _merged(
    stage: Stage,
    models: Sequence[Model],
    weights: Sequence[float],
    read: Sequence[Sequence],
    like: Named,
    earlier: Named,
    config: Config,
) -> Named:
    """The stage's parameters, over one model at a time."""
    solved, own, turned = stage
    mean = {name: torch.zeros_like(like[name], dtype=torch.float64) for name in own}
    moments: Named = {}
    answers: Named = {}
    unreached: set[str] = set()
    for model, weight, records in zip(models, weights, read):
        module = model.ask(Gradients).module()
        mine = {name: value.clone() for name, value in matched(module, like, model.ref).items() if name in mean}
        for name in own:
            mean[name] += weight * mine[name].double()
        seen = batches(model, records, config.batch_size)
        found = grams(load_into(module, earlier).to(device()), seen, solved)
        unreached |= set(solved) - found.keys()
        for name, gram in found.items():
            gram = weight * scaled(gram, config.scale)
            value = mine[f"{name}.weight"].double()
            answer = gram @ (value if name in turned else value.T)
            moments[name] = moments[name] + gram if name in moments else gram
            answers[name] = answers[name] + answer if name in answers else answer
    for name in solved:
        if name not in unreached:
            plain = mean[f"{name}.weight"]
            new = solve(moments[name], answers[name], plain if name in turned else plain.T, config.ridge)
            mean[f"{name}.weight"] = new if name in turned else new.T
    return {name: value.float().contiguous() for name, value in mean.items()}


def _shares(config: Config, inputs: Inputs) -> list[Sequence]:
    return shares(inputs.records("data"), config.groups, len(inputs.all("models")))


def _weights(config: Config, count: int) -> list[float]:
    weights = list(config.weights) or [1.0] * count
    if len(weights) != count:
        raise ConfigError(f"weights has {len(weights)} values for {count} models", fix="give one a model, in order")
    if not any(weights):
        raise ConfigError("all weights are zero", fix="leave out the models that should not count")
    return [weight / sum(weights) for weight in weights]


def agree(config: Config, inputs: Inputs) -> None:
    _weights(config, len(inputs.all("models")))
    _shares(config, inputs)
    match.agree(inputs.all("models"))


def cost(config: Config, sizes: Sizes) -> Cost:
    models, amount = sizes.models["models"], sizes.data["data"]
    model, count = models[0], len(models)
    stages = model.layers + 2 if config.inputs == "merged" else 1
    read = min(config.examples, amount.records)
    tokens = stages * count * read * amount.tokens / max(amount.records, 1)
    return Cost(
        flops=tokens * model.parameters * 4.0 + count * model.parameters * max(model.width, 1) * 4.0,
        steps=stages * count * (1 + read // config.batch_size),
        memory=36 * model.parameters,
        disk=model.bytes,
    )


METHOD = Method(
    paper="arXiv:2212.09849",
    config=Config,
    models={"models": Slot((Weights, Gradients, Codec), min=2, max=None, help="models to merge")},
    data={
        "data": DataSlot(
            Data.UNLABELED,
            ("text", "completion", "label", "pair", "image", "fact"),
            help="what the layers' inputs are read on; classes are not used",
        )
    },
    run=run,
    cost=cost,
    agree=agree,
)
