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

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import lfm.core
from lfm.core import Inputs, Meta, Method, Model, Run, Slot, Weights
from lfm.core.heavy import np
from lfm.fusing import Rule, fuse, gram
from lfm.fusing.inputs import Given, Tensors, Weighting, agree, one_each, opened, rebuilt, streamed
from lfm.fusing.joins import added, change, weighted
from lfm.fusing.rows import row_width

if TYPE_CHECKING:
    from lfm.core.model import LazyTensor

SMALL = 1e-7
PARALLEL = 1e-16


class Config(lfm.core.Config, frozen=True):
    weights: Weighting = ()
    of: Annotated[Literal["tensor", "row"], Meta(description="what is turned as one vector")] = "tensor"


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    weights = one_each("weights", config.weights, 2)
    names, tensors = opened((*inputs.all("base"), *inputs.all("models")))
    base, models = (tensors[0] if len(tensors) == 3 else None), tensors[-2:]
    made = merged(names, base, models, lambda name: {"weight": weights}, by_row=config.of == "row")
    return rebuilt(inputs, made)


def merged(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], given: Given, *, by_row: bool = False
) -> dict[str, LazyTensor]:
    """given: a tensor's `weight` by model. Streams the models once for the angles."""
    width = row_width(models[0]) if by_row else None
    products = gram(names, models, base=base, width=width)

    def found(name: str) -> dict[str, Any]:
        return {"weight": coefficients(products[name], *given(name)["weight"]), "scale": 1.0}

    rule = Rule(added, first=change, given=found, width=width) if base else Rule(weighted, given=found, width=width)
    return fuse(rule, names, models, base=base)


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
    run=run,
    cost=streamed(8),
    agree=agree,
)
