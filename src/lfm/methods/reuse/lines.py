"""Scale models' changes by depth, the first layers' least: they hold what is general, the last what is of the task.

    θ = θ_base + λ_ℓ τ,   λ_ℓ = α + β ℓ / (L − 1),   ℓ = 0 … L − 1

τ is one model's change from the base, or the sum of several models'; with `merged`, what another merge made of them,
less the base. Left out, α and β are the paper's: of one model's change α is given (0.5 here) and β = 1 − α, so that its
last block stays whole; of several, α = ‖Σᵢ τᵢ‖₁ / ‖τ‖₁ / N, which is the mean's scale, and β is to be searched (the
authors do, from 0.1 to 1; 0.4 here; reuse.evolve searches it too).

Paper: LiNeS, arXiv 2410.17146, and its code (wang-kee/LiNeS). As there, what lies in no block is scaled by α,
embeddings, last norm and head alike; their head is no part of what is merged, so that where it is, `last` names the
tensors that are scaled as the last block is. Differs: blocks are the numbers in tensors' names, counted in each stack.

Models: equal architecture, vocabulary, tensor names and shapes, the base's too. The result has the base's files and
dtypes; arithmetic is in fp64 and rounded once. Integer tensors must be equal in all. Tensors are streamed, twice with
`merged`. Errors: MismatchError before any weight is read, also where no name has a block's number; ConfigError for a
part of a name that none has; CorruptError naming a tensor that holds a NaN or an infinity.

On three of the zoo's experts, of three blocks, α = 0.5 of one's change keeps 94 to 96 % of its accuracy and gains 1.5
to 3.4 points on the other tasks, about what scaling all of it by 0.65 does; a sum of eight it makes worse.

    lfm run reuse.lines base=base models=math models=code --set beta=0.6 --out merged
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import lfm.core
from lfm.core import Inputs, Meta, Method, Model, Run, Slot, Weights
from lfm.core.errors import ConfigError, MismatchError
from lfm.fusing import Each, Rule, fuse, sums
from lfm.fusing.inputs import BASE, Given, Tensors, opened, streamed
from lfm.fusing.joins import added, change, weighted
from lfm.tensors import match
from lfm.tensors.depth import depths

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor

ALONE = 0.5
"""α of one model's change: what its embeddings and first block keep of it."""

RISE = 0.4
"""β of several models'."""


class Config(lfm.core.Config, frozen=True):
    alpha: Annotated[
        float | None, Meta(description="α, the first block's scale; null: 0.5 of one model, as an average of several")
    ] = None
    beta: Annotated[
        float | None, Meta(description="β, how much more the last block's is; null: 1 − α of one model, 0.4 of several")
    ] = None
    last: Annotated[
        tuple[str, ...], Meta(description="parts of names outside blocks: these tensors are scaled as the last block")
    ] = ()


def total(x: Each, weight: Each) -> float:
    """|Σᵢ wᵢ xᵢ|"""
    return abs(weighted(x, weight))


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    models, merged_ = inputs.all("models"), inputs.all("merged")
    names, (base, *tensors) = opened((inputs.model("base"), *models, *merged_))
    sources, changes = tensors[: len(models)], tensors[len(models) :] or tensors
    alpha, beta = _scales(config, len(models))
    if config.alpha is None and merged_:
        alpha *= run.step("norms", lambda: norm(names, base, sources) / (norm(names, base, changes) or 1.0))
    run.note(alpha=alpha, beta=beta)
    at = fractions(base, config.last)
    ones = (1.0,) * len(changes)
    made = merged(names, base, changes, lambda name: {"weight": ones, "scale": alpha + beta * at.get(name, 0.0)})
    return inputs.model("base").ask(Weights).replace(made)


def merged(names: Sequence[str], base: Tensors, models: Sequence[Tensors], given: Given) -> dict[str, LazyTensor]:
    """given: a tensor's `weight` by model, and its `scale`."""
    return fuse(Rule(added, first=change, given=given), names, models, base=base)


def norm(names: Sequence[str], base: Tensors, models: Sequence[Tensors]) -> float:
    """l₁ of the sum of the models' changes."""
    rule = Rule(total, first=change, given=lambda name: {"weight": (1.0,) * len(models)})
    return float(sum(found.sum() for found in sums(rule, names, models, base=base).values()))


def fractions(base: Tensors, last: Sequence[str]) -> dict[str, float]:
    """By name, ℓ / (L − 1), and 1 for what has a part of `last` in its name; what else lies in no block is left out."""
    inside = {name: depth.fraction for name, depth in depths(base).items()}
    outside = [name for name in base if name not in inside]
    for part in last:
        if not any(part in name for name in outside):
            raise ConfigError(
                f"last: no tensor outside the blocks has {part!r} in its name",
                fix=f"those outside: {', '.join(sorted(outside)[:8]) or 'none'}",
            )
    return inside | {name: 1.0 for name in outside if any(part in name for part in last)}


def _scales(config: Config, count: int) -> tuple[float, float]:
    alpha = config.alpha if config.alpha is not None else (ALONE if count == 1 else 1 / count)
    beta = config.beta if config.beta is not None else (1 - alpha if count == 1 else RISE)
    return alpha, beta


def agree(config: Config, inputs: Inputs) -> None:
    base = inputs.model("base")
    match.agree([base, *inputs.all("models"), *inputs.all("merged")])
    tensors: Any = base.ask(Weights).tensors()
    if not depths(tensors):
        raise MismatchError(
            f"{base.ref} has no numbered blocks",
            why=f"its tensors are {', '.join(list(tensors)[:4])}, …",
            fix="reuse.task_arithmetic scales all alike",
        )
    fractions(tensors, config.last)


METHOD = Method(
    paper="arXiv:2410.17146",
    config=Config,
    models={
        "base": BASE,
        "models": Slot((Weights,), max=None, help="fine-tuned models: the change of one, or the sum of several"),
        "merged": Slot((Weights,), min=0, help="what another merge made of the models: its change is scaled instead"),
    },
    run=run,
    cost=streamed(4),
    agree=agree,
)
