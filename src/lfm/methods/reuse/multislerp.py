"""Average models' weights, or their changes from a base, on the sphere: in the plane that touches it at their mean.

    uᵢ = θᵢ/|θᵢ|,   m = Σᵢ wᵢuᵢ / |Σᵢ wᵢuᵢ|,   v = Σᵢ wᵢ (uᵢ − ⟨uᵢ, m⟩ m)
    θ = (Σᵢ wᵢ |θᵢ|) (cos|v| m + sin|v| v/|v|)               (with a base: of θᵢ − θ_base, added to it)

Source: mergekit's multislerp (C. Goddard, goddard.blog/posts/multislerp-wow-what-a-cool-idea), each tensor as one
vector. All of it lies in the span of the models, so their inner products are all that is needed to find its
coefficients. Where the mean vanishes two models are averaged on the line, and more are refused.

Models: equal architecture, vocabulary, tensor names and shapes. The result has the base's files and dtypes, or else the
first one's; arithmetic is in fp64 and rounded once. Integer tensors must be equal in all. Tensors are streamed: memory
does not grow with the model. Errors: MismatchError before any weight is read; ConfigError for weights of another
number; CorruptError naming a tensor that holds a NaN or an infinity.

    lfm run reuse.multislerp models=a models=b --set weights=[1,3] --out merged
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import lfm.core
from lfm.core import Meta, Method, Run, Slot, Weights
from lfm.core.errors import MismatchError
from lfm.core.heavy import np
from lfm.fusing import Rule, fuse, gram
from lfm.fusing.inputs import Tensors, Weighting, agree, normalized, one_each, streamed, whole
from lfm.fusing.joins import added, change, weighted

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


SMALL = 1e-8


class Config(lfm.core.Config, frozen=True):
    weights: Weighting = ()
    normalize: Annotated[bool, Meta(description="divide the weights by their sum")] = True


def merge(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], configs: Callable[[str], Config], run: Run
) -> dict[str, LazyTensor]:
    products = gram(names, models, base=base)

    def found(name: str) -> dict[str, Any]:
        config = configs(name)
        weights = one_each("weights", config.weights, len(models))
        share = normalized(weights, name) if config.normalize else weights
        return {"weight": coefficients(name, products[name][0], np.asarray(share)), "scale": 1.0}

    rule = Rule(weighted, given=found) if base is None else Rule(added, first=change, given=found)
    return fuse(rule, names, models, base=base)


def coefficients(name: str, products: Any, weights: Any) -> Any:
    """What each model is multiplied by, from the inner products (n, n)."""

    def norm(of: Any) -> float:
        return float(np.sqrt(max(0.0, of @ products @ of)))

    norms = np.sqrt(np.diag(products))
    units = np.diag(1 / (norms + SMALL))  # row i: uᵢ in terms of the models
    mean = weights @ units
    if norm(mean) < SMALL:
        if len(weights) == 2:
            return weights
        raise MismatchError(f"the weighted models cancel out in {name!r}", fix="use other weights")
    mean = mean / norm(mean)
    tangent = weights @ (units - np.outer(units @ products @ mean, mean))
    length = norm(tangent) + SMALL
    return (norms @ weights) * (np.cos(length) * mean + np.sin(length) / length * tangent)


METHOD = Method(
    paper="mergekit",
    config=Config,
    models={
        "models": Slot((Weights,), min=2, max=None, help="models to average"),
        "base": Slot((Weights,), min=0, help="what their changes are measured from"),
    },
    run=whole(merge),
    cost=streamed(10),
    agree=agree,
    merge=merge,
)
