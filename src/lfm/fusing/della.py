"""Dropping changes by the rank of their magnitude: what DELLA's two merges share (arXiv 2406.11617)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lfm.core import Inputs, Meta
from lfm.core.errors import ConfigError
from lfm.core.heavy import np
from lfm.fusing.engine import Rule, sums
from lfm.fusing.inputs import Given, Tensors, one_each, together
from lfm.fusing.joins import change, magnitude
from lfm.fusing.rows import by_row, ranks, uniform

if TYPE_CHECKING:
    from lfm.core.model import LazyTensor

Rescale = Annotated[
    Literal["probability", "norm", "none"],
    Meta(description="how the kept are grown: each by its own probability, all of a tensor to its l₁ norm, or not"),
]
Epsilons = Annotated[
    tuple[Annotated[float, Meta(ge=0, lt=0.5)], ...],
    Meta(description="how far the probabilities reach around the density: one a model, or one for all"),
]


def dropped(
    names: Sequence[str], base: Tensors, models: Sequence[Tensors], given: Given, seed: int, *, own: bool
) -> list[dict[str, LazyTensor]]:
    """Each model's changes, those dropped being 0. own: the others are divided by their probability."""

    def of(i: int, name: str) -> LazyTensor:
        density, epsilon = given(name)["density"][i], given(name)["epsilon"][i]

        def fn(changes: Any, first: int) -> Any:
            if density >= 1:
                return changes
            width = changes.shape[1]
            place = ranks(changes) / (width - 1) if width > 1 else 0.5
            kept = density - epsilon + 2 * epsilon * place
            draws = uniform(seed, i, name, first, changes.size).reshape(changes.shape)
            return np.where(draws < kept, changes / kept if own else changes, 0.0)

        return by_row(base[name], models[i][name], fn)

    return [{name: of(i, name) for name in names} for i in range(len(models))]


def ratios(
    names: Sequence[str], base: Tensors, models: Sequence[Tensors], changes: Sequence[Tensors]
) -> dict[str, list[float]]:
    """By name, for each model, the l₁ norm of its changes by that of what is left of them; 1 where one is next to 0."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for model, left in zip(models, changes):
        before = sums(Rule(magnitude, first=change), names, [model], base=base)
        after = sums(Rule(magnitude), names, [left])
        for name in names:
            b, a = float(before[name][0, 0]), float(after[name][0, 0])
            found[name].append(b / a if min(a, b) >= 1e-7 else 1.0)
    return found


def agree(density: Sequence[float], epsilon: Sequence[float], inputs: Inputs) -> None:
    """ConfigError unless every probability is one; MismatchError unless base and models go together."""
    count = len(inputs.all("models"))
    for d, e in zip(one_each("density", density, count), one_each("epsilon", epsilon, count)):
        if d < 1 and not 0 < d - e <= d + e < 1:
            raise ConfigError(f"density {d} ± epsilon {e} is not within (0, 1)", fix="choose a smaller epsilon")
    together(inputs)
