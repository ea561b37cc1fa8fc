"""Take from another model the weights whose change matters most, by how much the row's distribution has changed.

    s = |θ₁ − θ_base| · KL(softmax θ₁ ‖ softmax θ_base)        the divergence of each row (last dimension), 10⁻⁸ added
    θ = θ₁ where s ≥ median(s) + 1.5 (Q₃(s) − Q₁(s)), else θ_base       quartiles over each tensor

Source: mergekit's arcee_fusion (Arcee, no paper). Quartiles are exact here; mergekit estimates those of tensors of more
than a million entries from a sample.

Models: equal architecture, vocabulary, tensor names and shapes, the base's too. The result has the base's files and
dtypes; arithmetic is in fp64 and rounded once, quartiles are of fp32 scores. Integer tensors must be equal in all.
Tensors are streamed. Errors: MismatchError before any weight is read; CorruptError naming a tensor that holds a NaN or
an infinity.

    lfm run reuse.arcee_fusion base=a models=b --out merged
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import lfm.core
from lfm.core import Method, Run, Slot, Weights
from lfm.core.heavy import np
from lfm.fusing import Each, Rule, fuse, kth_largest, sums
from lfm.fusing.inputs import BASE, Tensors, agree, streamed, whole
from lfm.fusing.rows import row_width
from lfm.tensors.lazy import size

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


class Config(lfm.core.Config, frozen=True):
    pass


def exponential(of_base: int, base: float, x: Each) -> float:
    return math.exp(base) if of_base == 1 else math.exp(x[0])


def divergence(base: float, x: Each, total: float, base_total: float) -> float:
    """One entry's part of the row's KL divergence."""
    p = math.exp(x[0]) / total + 1e-8
    q = math.exp(base) / base_total + 1e-8
    return p * math.log(p / q)


def score(base: float, x: Each, kl: float) -> float:
    return abs(x[0] - base) * kl


def taken(base: float, x: Each, kl: float, limit: float) -> float:
    return x[0] if np.float32(score(base, x, kl)) >= limit else base


def merge(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], configs: Callable[[str], Config], run: Run
) -> dict[str, LazyTensor]:
    assert base is not None
    width = row_width(base)
    totals = sums(Rule(exponential, width=width), names, models, [(0,), (1,)], base=base)

    def normal(name: str) -> dict[str, Any]:
        return {"total": totals[name][:, 0], "base_total": totals[name][:, 1]}

    rows = sums(Rule(divergence, given=normal, width=width), names, models, base=base)
    kl = {name: found[:, 0] for name, found in rows.items()}
    counts = [size(base[name]) for name in names]
    ranks = [[n - int(q * (n - 1)) for q in (0.25, 0.5, 0.75)] if n else [] for n in counts]
    scored = Rule(score, given=lambda n: {"kl": kl[n]}, width=width)
    quartiles = dict(zip(names, kth_largest(scored, [[name] for name in names], models, ranks, base=base)))

    def limit(name: str) -> float:
        if not quartiles[name]:
            return 0.0
        low, median, high = (np.float32(q) for q in quartiles[name])
        return float(median + np.float32(1.5) * (high - low))

    rule = Rule(taken, given=lambda n: {"kl": kl[n], "limit": limit(n)}, width=width)
    return fuse(rule, names, models, base=base)


METHOD = Method(
    paper="mergekit",
    config=Config,
    models={"base": BASE, "models": Slot((Weights,), help="the model to take from")},
    run=whole(merge),
    cost=streamed(100),
    agree=agree,
    merge=merge,
)
