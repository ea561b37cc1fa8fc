"""Go from a base towards the mean of models fine-tuned from it, as far as the angle between their changes advises.

    t = k cos θ / (1 + (k − 1) cos θ),    θ = t · mean(θᵢ) + (1 − t) θ_base
    cos θ: the mean over pairs of cos(θᵢ − θ_base, θⱼ − θ_base), for each tensor, or each of its rows (`of`)

Paper: Model Stock, arXiv 2403.19522; k models of one base that were fine-tuned alike. The nearer the models' changes
are to one another, the further along their mean the centre lies. Where the denominator is 0, the base stays. `of`
tensor is mergekit's default, row its filter_wise.

Models: equal architecture, vocabulary, tensor names and shapes, the base's too. The result has the base's files and
dtypes; arithmetic is in fp64 and rounded once. Integer tensors must be equal in all. Tensors are streamed: memory does
not grow with the model. Errors: MismatchError before any weight is read; CorruptError naming a tensor that holds a NaN
or an infinity.

    lfm run reuse.model_stock base=base models=a models=b --out merged
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import lfm.core
from lfm.core import Meta, Method, Run, Slot, Weights
from lfm.core.heavy import np
from lfm.fusing import Rule, fuse, gram
from lfm.fusing.inputs import BASE, Tensors, agree, by_setting, streamed, whole
from lfm.fusing.joins import added, change
from lfm.fusing.rows import row_width

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


SMALL = 1e-6


class Config(lfm.core.Config, frozen=True):
    of: Annotated[Literal["tensor", "row"], Meta(description="what has an angle of its own")] = "tensor"


def merge(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], configs: Callable[[str], Config], run: Run
) -> dict[str, LazyTensor]:
    assert base is not None

    def drawn(of: str, names: Sequence[str]) -> dict[str, LazyTensor]:
        width = row_width(base) if of == "row" else None
        products = gram(names, models, base=base, width=width)
        weight = [1 / len(models)] * len(models)
        given = {name: {"weight": weight, "scale": ratio(found)} for name, found in products.items()}
        return fuse(Rule(added, first=change, given=given.__getitem__, width=width), names, models, base=base)

    return by_setting(names, lambda name: configs(name).of, drawn)


def ratio(products: Any) -> Any:
    """t of each group, from the inner products of the changes (groups, k, k)."""
    k = products.shape[-1]
    norms = np.sqrt(np.einsum("gii->gi", products))
    pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
    cosines = [products[:, i, j] / np.maximum(norms[:, i] * norms[:, j], SMALL) for i, j in pairs]
    cosine = np.mean(np.clip(cosines, -1, 1), axis=0)
    below = 1 + (k - 1) * cosine
    flat = np.abs(below) < SMALL
    return np.where(flat, 0.0, k * cosine / np.where(flat, 1.0, below))


METHOD = Method(
    paper="arXiv:2403.19522",
    config=Config,
    models={"base": BASE, "models": Slot((Weights,), min=2, max=None, help="models fine-tuned from it alike")},
    run=whole(merge),
    cost=streamed(10),
    agree=agree,
    merge=merge,
)
