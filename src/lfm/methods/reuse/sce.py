"""Merge fine-tuned models where their changes vary most: select, calculate weights, erase opposing signs.

    mask = the fraction `density` of the entries whose variance over the models is not 0 that varies most
    wᵢ   = mean (mask τᵢ)² / Σⱼ mean (mask τⱼ)²         for each tensor, τᵢ = θᵢ − θ_base
    γ    = sgn(Σᵢ mask τᵢ), + where it is 0
    θ    = θ_base + Σᵢ wᵢ mask τᵢ [sgn τᵢ = γ] / Σᵢ wᵢ [sgn τᵢ = γ]

Paper: FuseChat, arXiv 2408.07990 (SCE); mergekit's sce, whose select_topk is `density`. Weights are all equal where no
change is left. Entries of equal variance at the threshold are all selected, so that the result rests on no order.

Models: equal architecture, vocabulary, tensor names and shapes, the base's too. The result has the base's files and
dtypes; arithmetic is in fp64 and rounded once, thresholds are exact. Integer tensors must be equal in all. Tensors are
streamed. Errors: MismatchError before any weight is read; CorruptError naming a tensor that holds a NaN or an infinity.

    lfm run reuse.sce base=base models=math models=code --set density=0.1 --out merged
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import lfm.core
from lfm.core import Meta, Method, Run
from lfm.core.heavy import np
from lfm.fusing import Each, Rule, fuse, kth_largest, sums
from lfm.fusing.inputs import BASE_AND_TUNED, Tensors, agree, streamed, whole
from lfm.fusing.joins import moved

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


class Config(lfm.core.Config, frozen=True):
    density: Annotated[float, Meta(gt=0, le=1, description="fraction of the varying entries that is selected")] = 1.0


def variance(base: float, x: Each) -> float:
    mean = 0.0
    for i in range(len(x)):
        mean += (x[i] - base) / len(x)
    total = 0.0
    for i in range(len(x)):
        total += (x[i] - base - mean) ** 2
    return total / len(x)


def varies(base: float, x: Each) -> float:
    return 1.0 if np.float32(variance(base, x)) > 0.0 else 0.0


def selected(base: float, x: Each, limit: float) -> bool:
    return bool(limit <= 0.0 or np.float32(variance(base, x)) >= limit)


def energy(model: int, base: float, x: Each, limit: float) -> float:
    return (x[model] - base) ** 2 if selected(base, x, limit) else 0.0


def fused(base: float, x: Each, limit: float, weight: Each) -> float:
    elected = 0.0
    for i in range(len(x)):
        elected += x[i] - base
    sign = 1.0 if elected >= 0.0 else -1.0
    total, mass = 0.0, 0.0
    for i in range(len(x)):
        same = (x[i] - base) * sign > 0.0
        total += weight[i] * (x[i] - base) if same else 0.0
        mass += weight[i] if same else 0.0
    return moved(base, total / max(mass, 1e-6) if selected(base, x, limit) else 0.0)


def merge(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], configs: Callable[[str], Config], run: Run
) -> dict[str, LazyTensor]:
    assert base is not None
    limits = dict.fromkeys(names, 0.0)
    some = [name for name in names if configs(name).density < 1]
    if some:
        counts = sums(Rule(varies), some, models, base=base)
        keep = [int(counts[name][0, 0] * configs(name).density) for name in some]
        ranks = [[k] if k else [] for k in keep]
        found = kth_largest(Rule(variance), [[name] for name in some], models, ranks, base=base)
        limits |= {name: limit[0] if limit else np.inf for name, limit in zip(some, found)}
    parts = sums(
        Rule(energy, given=lambda n: {"limit": limits[n]}), names, models, [(i,) for i in range(len(models))], base=base
    )

    def settings(name: str) -> dict[str, Any]:
        each = parts[name][0] / max(1, int(np.prod(base[name].shape)))
        total = each.sum()
        return {"limit": limits[name], "weight": each / total if total >= 1e-6 else np.full(len(each), 1 / len(each))}

    return fuse(Rule(fused, given=settings), names, models, base=base)


METHOD = Method(
    paper="arXiv:2408.07990",
    config=Config,
    models=BASE_AND_TUNED,
    run=whole(merge),
    cost=streamed(40),
    agree=agree,
    merge=merge,
)
