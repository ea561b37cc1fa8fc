"""Interpolate between two models' weights, or their changes from a base, along the arc that joins them.

    t = w₁ / (w₀ + w₁),   θ = sin((1−t)Ω)/sin Ω · θ₀ + sin(tΩ)/sin Ω · θ₁    (with a base: of θᵢ − θ_base, added to it)

Source: mergekit's nuslerp: slerp with a weight a model, of tensors or of their rows (`of`), on the line only where the
two are parallel to rounding (1 − cos² Ω ≤ 10⁻¹⁶). Weights that sum to 0 give t = ½.

Models: equal architecture, vocabulary, tensor names and shapes. The result has the base's files and dtypes, or else the
first one's; arithmetic is in fp64 and rounded once. Integer tensors must be equal in all. Tensors are streamed: memory
does not grow with the model. Errors: MismatchError before any weight is read; ConfigError for weights of another
number; CorruptError naming a tensor that holds a NaN or an infinity.

    lfm run reuse.nuslerp models=a models=b --set weights=[1,3] --out merged
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import lfm.core
from lfm.core import Meta, Method, Run, Slot, Weights
from lfm.core.heavy import np
from lfm.fusing import Rule, fuse, gram
from lfm.fusing.inputs import Tensors, Weighting, agree, by_setting, one_each, streamed, whole
from lfm.fusing.joins import added, change, weighted
from lfm.fusing.rows import by_column, column_gram, row_width

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


SMALL = 1e-7
PARALLEL = 1e-16


class Config(lfm.core.Config, frozen=True):
    weights: Weighting = ()
    of: Annotated[Literal["tensor", "row", "column"], Meta(description="what is turned as one vector")] = "tensor"


def merge(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], configs: Callable[[str], Config], run: Run
) -> dict[str, LazyTensor]:
    def turned(of: str, names: Sequence[str]) -> dict[str, LazyTensor]:
        if of == "column":
            return by_columns(names, base, models, lambda name: one_each("weights", configs(name).weights, 2))
        width = row_width(models[0]) if of == "row" else None
        products = gram(names, models, base=base, width=width)

        def found(name: str) -> dict[str, Any]:
            weights = one_each("weights", configs(name).weights, 2)
            return {"weight": coefficients(products[name], *weights), "scale": 1.0}

        rule = Rule(weighted, given=found, width=width)
        if base is not None:
            rule = Rule(added, first=change, given=found, width=width)
        return fuse(rule, names, models, base=base)

    return by_setting(names, lambda name: configs(name).of, turned)


def by_columns(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], weights: Callable[[str], tuple[float, ...]]
) -> dict[str, LazyTensor]:
    """The same of each column, along the first dimension."""
    turned: list[dict[str, LazyTensor]] = [{}, {}]
    for name in names:
        start, given = (base[name] if base is not None else None), [model[name] for model in models]
        factors = coefficients(column_gram(start, given), *weights(name))
        for i, model in enumerate(given):
            turned[i][name] = by_column(start, model, factors[:, i])
    ones = {"weight": (1.0, 1.0), "scale": 1.0}
    rule = Rule(weighted if base is None else added, given=lambda name: ones)
    return fuse(rule, names, turned, base=base, like=base if base is not None else models[0])


def coefficients(products: Any, first: float, second: float) -> Any:
    """What the two are multiplied by in each group (groups, 2), from their inner products (groups, 2, 2)."""
    total = first + second
    t = 0.5 if abs(total) < 1e-6 else second / total
    norms = np.maximum(np.sqrt(np.einsum("gii->gi", products)), SMALL)
    cosine = np.clip(products[:, 0, 1] / (norms[:, 0] * norms[:, 1]), -1, 1)
    line = 1 - cosine**2 <= PARALLEL
    angle = np.arccos(np.where(line, 0.0, cosine))
    arc = np.stack([np.sin((1 - t) * angle), np.sin(t * angle)], axis=1) / np.sin(angle)[:, None]
    return np.where(line[:, None], np.array([1 - t, t]), arc)


METHOD = Method(
    paper="mergekit",
    config=Config,
    models={
        "models": Slot((Weights,), min=2, max=2, help="the two to interpolate between, in order"),
        "base": Slot((Weights,), min=0, help="what their changes are measured from"),
    },
    run=whole(merge),
    cost=streamed(8),
    agree=agree,
    merge=merge,
)
