"""Dropping changes by the rank of their magnitude: what DELLA's two merges share (arXiv 2406.11617)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lfm.core import Inputs, Meta
from lfm.core.errors import ConfigError
from lfm.core.heavy import np
from lfm.fusing.engine import Rule, sums
from lfm.fusing.inputs import Tensors, one_each, together
from lfm.fusing.joins import change, magnitude
from lfm.fusing.masks import ratio
from lfm.fusing.rows import by_row, ranks, uniform

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor

Rescale = Annotated[
    Literal["probability", "norm", "none"],
    Meta(description="how the kept are grown: each by its own probability, all of a tensor to its l₁ norm, or not"),
]
Epsilons = Annotated[
    tuple[Annotated[float, Meta(ge=0, lt=0.5)], ...],
    Meta(description="how far the probabilities reach around the density: one a model, or one for all"),
]


def dropped(
    names: Sequence[str],
    base: Tensors,
    models: Sequence[Tensors],
    configs: Callable[[str], Any],
    seed: int,
) -> tuple[list[dict[str, LazyTensor]], Callable[[str], list[float]]]:
    """Each model's changes, those dropped being 0; and, by name, what each model's are to be multiplied by."""
    count = len(models)

    def of(i: int, name: str) -> LazyTensor:
        config = configs(name)
        density, epsilon = (one_each(s, getattr(config, s), count)[i] for s in ("density", "epsilon"))

        def fn(changes: Any, first: int) -> Any:
            if density >= 1 or density <= 0:
                return changes * (density >= 1)
            width = changes.shape[1]
            place = ranks(changes) / (width - 1) if width > 1 else 0.5
            kept = density - epsilon + 2 * epsilon * place
            draws = uniform(seed, i, name, first, changes.size).reshape(changes.shape)
            return np.where(draws < kept, changes / kept if config.rescale == "probability" else changes, 0.0)

        return by_row(base[name], models[i][name], fn)

    changes = [{name: of(i, name) for name in names} for i in range(count)]
    to_norm = [name for name in names if configs(name).rescale == "norm"]
    grown: dict[str, list[float]] = {name: [] for name in to_norm}
    for model, left in zip(models, changes):
        before = sums(Rule(magnitude, first=change), to_norm, [model], base=base)
        after = sums(Rule(magnitude), to_norm, [left])
        for name in to_norm:
            grown[name].append(ratio(float(before[name][0, 0]), float(after[name][0, 0])))
    return changes, lambda name: grown.get(name, [1.0] * count)


def agree(density: Sequence[float], epsilon: Sequence[float], inputs: Inputs) -> None:
    """ConfigError unless every probability is one; MismatchError unless base and models go together."""
    count = len(inputs.all("models"))
    for d, e in zip(one_each("density", density, count), one_each("epsilon", epsilon, count)):
        if 0 < d < 1 and not 0 < d - e <= d + e < 1:
            raise ConfigError(f"density {d} ± epsilon {e} is not within (0, 1)", fix="choose a smaller epsilon")
    together(inputs)
