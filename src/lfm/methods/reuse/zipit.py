"""Merge the units of two models that are most alike, of one model or of both, into as many as one model has.

    Wₗ = ½ Σₘ 2 Mₗᵐ Wₗᵐ (Uₗ₋₁ᵐ)ᵀ,   M (n, 2n) averages units that correlate, U (2n, n) gives each its merged one back

Paper: ZipIt!, arXiv 2305.03053, with its greedy matching; `alpha` and `beta` are the paper's. What differs: the axes
are found by following one forward pass (lfm.models.symmetry), so any architecture goes. Units are zipped only where
each stands for itself: feed-forward keys, channels behind batch norms. Where something mixes them (a residual stream
under layer norms, attention heads) averages do not pass through, and they are permuted one to one as the follow-up for
transformers does (2403.00986), by activations. `until` < 1 zips the first groups of the pass alone (partial zipping);
the paper then keeps both models' later layers, here they are permuted and averaged, so that the result has one model's
shape. With `reset` batch norms' statistics are measured anew on the data, as the authors do.

Models: two of one architecture and vocabulary, with one head: what each label means is the same in both; the result is
a plain checkpoint like the first. Data: unlabelled records that both models read. Memory: (2n)² for each group of n.
Errors: MismatchError before any weight is read.

    lfm run reuse.zipit models=a models=b data=texts.jsonl --set beta=0.5 --out merged
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import lfm.core
from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot, Weights
from lfm.data.shares import batches
from lfm.models import device
from lfm.models.aligning import align
from lfm.models.covariance import across, together
from lfm.models.mixing import load_into, matched, parameters_of
from lfm.models.norms import measured_anew
from lfm.models.symmetry import groups, key, permuted, symmetry
from lfm.models.zipping import merged, zipped
from lfm.tensors import match
from lfm.tensors.match import floating, same

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch

Named = dict[str, "Tensor"]


class Config(lfm.core.Config, frozen=True):
    alpha: Annotated[float, Meta(ge=0, le=1, description="what a merged unit's correlations are multiplied by")] = 0.3
    beta: Annotated[float, Meta(ge=0, le=1, description="share of the merges that may be within one model")] = 0.125
    until: Annotated[float, Meta(ge=0, le=1, description="share of the groups, in the pass's order, to zip")] = 1.0
    reset: Annotated[bool, Meta(description="measure batch norms' running statistics anew, on the data")] = True
    examples: Annotated[int, Meta(ge=1, description="records read, at most: the first")] = 256
    batch_size: Annotated[int, Meta(ge=1, description="records a batch")] = 32


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    first, second = inputs.all("models")
    stored = first.ask(Weights).tensors()
    same(stored.keys() - set(floating(stored)), [first, second])
    shell, other = first.ask(Gradients).module(), second.ask(Gradients).module()
    matched(other, parameters_of(shell), second.ref)
    seen = batches(first, inputs.records("data")[: config.examples], config.batch_size)
    made, told = run.step("zipped", lambda: _zipped(config, shell, other, seen, run.generator("order")))
    run.note(**told)
    module = load_into(shell, made)
    if config.reset:
        measured_anew(module.to(device()), seen)
    return first.ask(Gradients).rewrap(module)


def _zipped(
    config: Config, shell: nn.Module, other: nn.Module, seen: Sequence[Batch], order: torch.Generator
) -> tuple[Named, dict[str, float | str]]:
    """The merged parameters, and what is to tell of them."""
    a, b = parameters_of(shell), parameters_of(other)
    trained = {name: a[name] for name, _ in shell.named_parameters()}
    found = symmetry(shell, seen[0])
    pairs = together([shell.to(device()), other.to(device())], seen)
    for module in (shell, other):
        module.cpu()
    may = [pair for pair in pairs if pair.group.pointwise and pair.reads]
    chosen = may[: round(config.until * len(may))]
    zips = [(pair.group, zipped(pair.correlation, config.alpha, config.beta)) for pair in chosen]
    kept = {key(group) for group, _ in zips}
    moves = align(trained, b, found.groups, order, across(pairs))
    outside = {id(g) for group in found.groups if key(group) not in kept for g in groups([group])}
    b = permuted(b, [(group, move) for group, move in moves if id(group) in outside])
    units = sum(group.size for group, _ in zips)
    return merged(a, b, zips), {
        "groups": float(len(found.groups)),
        "groups_zipped": float(len(zips)),
        "pinned_by": ", ".join(found.unknown) or "nothing",
        "units_zipped": float(units),
        "of_one_model": float(sum(found.within for _, found in zips)),
    }


def agree(config: Config, inputs: Inputs) -> None:
    match.agree(inputs.all("models"))


def cost(config: Config, sizes: Sizes) -> Cost:
    model, amount = sizes.models["models"][0], sizes.data["data"]
    read = min(config.examples, amount.records)
    tokens = read * amount.tokens / max(amount.records, 1)
    width = max(model.width, 1)
    return Cost(
        flops=8.0 * tokens * (model.parameters + 16.0 * max(model.layers, 1) * width * width)
        + 16.0 * model.parameters * width,
        steps=4 + 3 * (1 + read // config.batch_size) + 40 * max(model.layers, 1),
        memory=40 * model.parameters,
        disk=model.bytes,
    )


METHOD = Method(
    paper="arXiv:2305.03053",
    config=Config,
    models={"models": Slot((Weights, Gradients, Codec), min=2, max=2, help="the model kept in place, and the other")},
    data={
        "data": DataSlot(
            Data.UNLABELED,
            ("text", "completion", "label", "pair", "image", "fact"),
            help="what activations and statistics are read on; classes are not used",
        )
    },
    run=run,
    cost=cost,
    agree=agree,
)
