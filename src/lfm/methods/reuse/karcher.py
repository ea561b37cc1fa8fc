"""Average models' weights on the sphere: the point from which the arcs to all of them, weighed, cancel out.

    μ ← cos|v| μ + sin|v| v/|v|,   v = Σᵢ wᵢ θᵢ/sin θᵢ (uᵢ − cos θᵢ μ),   cos θᵢ = ⟨μ, uᵢ⟩,   uᵢ = xᵢ/|xᵢ|
    until |v| < tol; the merged tensor is (Σᵢ wᵢ |xᵢ|) μ

Paper: arXiv 2603.04972 (the Karcher, or Fréchet, mean), each tensor as one vector; mergekit's karcher, whose weights
are equal. All of it lies in the span of the models, so their inner products are all that is needed to find its
coefficients, and the iteration costs nothing. Models whose tensor is 0 do not count in the direction.

Models: equal architecture, vocabulary, tensor names and shapes. The result has the first one's files and dtypes;
arithmetic is in fp64 and rounded once. Integer tensors must be equal in all. Tensors are streamed: memory does not grow
with the model. Errors: MismatchError before any weight is read; ConfigError for weights of another number; CorruptError
naming a tensor that holds a NaN or an infinity.

    lfm run reuse.karcher models=a models=b --out merged
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import lfm.core
from lfm.core import Meta, Method, Run, Slot, Weights
from lfm.core.heavy import np
from lfm.fusing import Rule, fuse, gram
from lfm.fusing.inputs import Tensors, Weighting, agree, normalized, one_each, streamed, whole
from lfm.fusing.joins import weighted

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


class Config(lfm.core.Config, frozen=True):
    weights: Weighting = ()
    max_iter: Annotated[int, Meta(ge=0, description="steps at most")] = 10
    tol: Annotated[float, Meta(gt=0, description="length of a step that is the last; smaller norms count as 0")] = 1e-5


def merge(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], configs: Callable[[str], Config], run: Run
) -> dict[str, LazyTensor]:
    products = gram(names, models)

    def found(name: str) -> dict[str, Any]:
        config = configs(name)
        weights = np.asarray(normalized(one_each("weights", config.weights, len(models)), name))
        return {"weight": coefficients(products[name][0], weights, config.max_iter, config.tol)}

    return fuse(Rule(weighted, given=found), names, models)


def coefficients(products: Any, weights: Any, max_iter: int, tol: float) -> Any:
    """What each model is multiplied by, from the inner products (n, n)."""

    def norm(of: Any) -> float:
        return float(np.sqrt(max(0.0, of @ products @ of)))

    norms = np.sqrt(np.diag(products))
    counted = np.flatnonzero(norms > tol)
    if not len(counted):
        return np.zeros(len(weights))
    units = np.diag(1 / np.where(norms > tol, norms, 1.0))  # row i: uᵢ in terms of the models
    share = np.where(norms > tol, weights, 0.0) / weights[counted].sum()
    mean = share @ units
    mean = units[counted[0]] if norm(mean) < tol else mean / norm(mean)
    for _ in range(max_iter):
        step = np.zeros(len(weights))
        for i in counted:
            cosine = float(np.clip(mean @ products @ units[i], -1, 1))
            angle = np.arccos(cosine)
            if angle >= tol:
                step = step + share[i] * angle / np.sin(angle) * (units[i] - cosine * mean)
        length = norm(step)
        if length < tol:
            break
        mean = np.cos(length) * mean + np.sin(length) * step / length
        mean = mean / norm(mean)
    return (weights @ norms) * mean


METHOD = Method(
    paper="arXiv:2603.04972",
    config=Config,
    models={"models": Slot((Weights,), min=2, max=None, help="models to average")},
    run=whole(merge),
    cost=streamed(8),
    agree=agree,
    merge=merge,
)
