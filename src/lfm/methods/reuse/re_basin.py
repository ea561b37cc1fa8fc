"""Permute one model's units so that they stand where the other's like ones do, then average the two.

    θ = (1 − t) θ₀ + t π(θ₁),   π = argmax Σ ⟨θ₀, π(θ₁)⟩ over the permutations that leave θ₁'s outputs as they are

Paper: Git Re-Basin, arXiv 2209.04836: weight matching, coordinate descent over groups with linear assignments; with
match=activations, Σ ⟨Z₀, π(Z₁)⟩ over activations on the data less their means. What differs: the permutations are found
by following one forward pass (lfm.models.symmetry), so any architecture goes, and operations not understood are left
alone; attention heads move as blocks, with what may be permuted within them; running statistics are permuted but not
matched by. With `reset` batch norms' statistics are measured anew on the data (as REPAIR does, 2211.08403).

Models: two of one architecture and vocabulary, trained apart; the result is a plain checkpoint like the first. Data,
optional: unlabelled records. Models of one fine-tuning need no permutation. The run notes ‖θ₀ − θ₁‖ before and after,
and by how much, of its greatest logit, the second model's logits changed when it was permuted (rounding). What no layer
reads (queries and keys inside a head) is matched by weights always. Errors: MismatchError before any weight is read;
SlotError where what was asked for takes data; CorruptError where the second model's logits are not finite.

    lfm run reuse.re_basin models=a models=b --set t=0.5 --out merged
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import lfm.core
from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot, Weights
from lfm.core.errors import CorruptError, ModelError, SlotError
from lfm.data.shares import batches
from lfm.models import device
from lfm.models.aligning import Told, align
from lfm.models.covariance import across, together
from lfm.models.mixing import load_into, matched, parameters_of
from lfm.models.norms import measured_anew
from lfm.models.symmetry import Group, difference, example, permuted, symmetry
from lfm.tensors import match
from lfm.tensors.match import floating, same

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch

Named = dict[str, "Tensor"]


class Config(lfm.core.Config, frozen=True):
    t: Annotated[float, Meta(ge=0, le=1, description="where between the first model (0) and the second (1)")] = 0.5
    match: Annotated[
        Literal["weights", "activations"], Meta(description="what like units have alike: activations take data")
    ] = "weights"
    reset: Annotated[bool, Meta(description="measure batch norms' running statistics anew, on the data")] = False
    examples: Annotated[int, Meta(ge=1, description="records read, at most: the first")] = 256
    batch_size: Annotated[int, Meta(ge=1, description="records a batch")] = 32


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    first, second = inputs.all("models")
    stored = first.ask(Weights).tensors()
    same(stored.keys() - set(floating(stored)), [first, second])
    shell, other = first.ask(Gradients).module(), second.ask(Gradients).module()
    records = inputs.records("data")[: config.examples]
    seen = batches(first, records, config.batch_size) if records else []

    a = {name: value.clone() for name, value in parameters_of(shell).items()}
    b, told = run.step(
        "aligned", lambda: _aligned(config, shell, other, seen or [example(first)], second.ref, run.generator("order"))
    )
    run.note(**told)
    merged = load_into(shell, {name: value.lerp(b[name], config.t) for name, value in a.items()})
    if config.reset:
        measured_anew(merged.to(device()), seen)
    return first.ask(Gradients).rewrap(merged)


def _aligned(
    config: Config, shell: nn.Module, other: nn.Module, seen: Sequence[Batch], ref: str, order: torch.Generator
) -> tuple[Named, dict[str, float | str]]:
    """The second module's parameters, permuted towards the first one's, and what is to tell of it."""
    a = {name: value for name, value in parameters_of(shell).items() if name in dict(shell.named_parameters())}
    b = matched(other, parameters_of(shell), ref)
    found = symmetry(shell, seen[0])
    moves = align(a, b, found.groups, order, _gains(config, shell, other, seen))
    made = permuted(b, moves)
    changed = difference(other, made, seen[0])
    if math.isnan(changed):
        raise CorruptError(
            f"the logits of {ref} are not finite",
            why="whether a permutation leaves them as they are cannot be told",
            fix="use a model whose activations stay within what fp32 can hold",
        )
    if changed > 1e-2:
        raise ModelError(
            f"permuting {ref} changed its logits by {changed:.1%}",
            why="a symmetry was taken for one that is none",
            fix="reuse.linear averages without permuting",
        )
    return made, {
        "groups": float(len(found.groups)),
        "pinned_by": ", ".join(found.unknown) or "nothing",
        "distance_before": _distance(a, b),
        "distance_after": _distance(a, made),
        "logits_changed": changed,
    }


def _gains(config: Config, shell: nn.Module, other: nn.Module, seen: Sequence[Batch]) -> Callable[[Group], Told | None]:
    """Cov(Z₀, Z₁) for each group that activations decide."""
    if config.match == "weights":
        return lambda group: None
    return across(together([shell, other], seen))


def _distance(a: Named, b: Named) -> float:
    return sum(float((value - b[name]).double().square().sum()) for name, value in a.items()) ** 0.5


def agree(config: Config, inputs: Inputs) -> None:
    if (config.reset or config.match == "activations") and not inputs.records("data"):
        asked = "match=activations" if config.match == "activations" else "reset"
        raise SlotError(f"{asked} reads data", why="there are no records for 'data'", fix="add data=FILE")
    match.agree(inputs.all("models"))


def cost(config: Config, sizes: Sizes) -> Cost:
    model = sizes.models["models"][0]
    read, tokens = 2, 16.0
    if "data" in sizes.data:
        amount = sizes.data["data"]
        read = min(config.examples, amount.records)
        tokens = read * amount.tokens / max(amount.records, 1)
    sweeps = 10  # as many as models of the zoo take
    return Cost(
        flops=8.0 * tokens * model.parameters + 2.0 * sweeps * model.parameters * max(model.width, 1),
        steps=4 + 2 * (1 + read // config.batch_size) + sweeps * 4 * max(model.layers, 1),
        memory=40 * model.parameters,
        disk=model.bytes,
    )


METHOD = Method(
    paper="arXiv:2209.04836",
    config=Config,
    models={"models": Slot((Weights, Gradients, Codec), min=2, max=2, help="the model kept in place, and the other")},
    data={
        "data": DataSlot(
            Data.UNLABELED,
            ("text", "completion", "label", "pair", "image", "fact"),
            optional=True,
            help="what activations and statistics are read on; classes are not used",
        )
    },
    run=run,
    cost=cost,
    agree=agree,
)
