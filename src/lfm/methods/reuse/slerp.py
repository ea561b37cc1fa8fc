"""Interpolate between two models' weights along the arc that joins them, tensor by tensor.

    θ = sin((1−t)Ω)/sin Ω · θ₀ + sin(tΩ)/sin Ω · θ₁,      cos Ω = ⟨θ₀, θ₁⟩ / (|θ₀| |θ₁|)

Source: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985, with a tensor as one vector; mergekit's
slerp. As there, tensors that are nearly parallel (|cos Ω| > 0.9995) are interpolated on the line, and a tensor whose
norm is at most 10⁻⁸ counts as one of norm 1 when Ω is found.

Models: two, with equal architecture, vocabulary, tensor names and shapes; t = 0 is the first. The result has its files
and dtypes; arithmetic is in fp64 and rounded once. Integer tensors must be equal. Tensors are streamed, once for the
inner products and once for the result. Errors: MismatchError before any weight is read; CorruptError naming a tensor
that holds a NaN or an infinity.

    lfm run reuse.slerp models=a models=b --set t=0.3 --out merged
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import lfm.core
from lfm.core import Meta, Method, Run, Slot, Weights
from lfm.fusing import Rule, fuse, gram
from lfm.fusing.inputs import Tensors, agree, known, streamed, whole
from lfm.fusing.joins import weighted

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


PARALLEL = 0.9995
SMALL = 1e-8


class Config(lfm.core.Config, frozen=True):
    t: Annotated[float, Meta(description="how far to go from the first model (0) to the second (1), or beyond")] = 0.5


def merge(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], configs: Callable[[str], Config], run: Run
) -> dict[str, LazyTensor]:
    products = known(run, "products", names, lambda: {n: g[0].tolist() for n, g in gram(names, models).items()})
    return fuse(Rule(weighted, given=lambda n: {"weight": coefficients(products[n], configs(n).t)}), names, models)


def coefficients(products: Any, t: float) -> tuple[float, float]:
    """What the two are multiplied by, from their inner products (2, 2)."""
    a, b = (norm if (norm := math.sqrt(products[i][i])) > SMALL else 1.0 for i in range(2))
    cosine = max(-1.0, min(1.0, products[0][1] / (a * b)))
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


METHOD = Method(
    paper="Shoemake, SIGGRAPH 1985",
    config=Config,
    models={"models": Slot((Weights,), min=2, max=2, help="the two to interpolate between, in order")},
    run=whole(merge),
    cost=streamed(6),
    agree=agree,
    merge=merge,
)
