"""Pass one model's weights on, multiplied by a number.

    θ = s θ₁                                     (`scale` is s; 1 gives the model itself, bit for bit)

Source: mergekit's passthrough, of which recipes make models of slices.

Models: one. The result has its files and dtypes; arithmetic is in fp64 and rounded once. Integer tensors stay. Tensors
are streamed: memory does not grow with the model. Errors: CorruptError naming a tensor that holds a NaN or an infinity.

    lfm run reuse.passthrough models=a --set scale=0.9 --out scaled
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import lfm.core
from lfm.core import Meta, Method, Run, Slot, Weights
from lfm.fusing import Rule, fuse
from lfm.fusing.inputs import Tensors, agree, streamed, whole
from lfm.fusing.joins import weighted

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


class Config(lfm.core.Config, frozen=True):
    scale: Annotated[float, Meta(description="what every weight is multiplied by")] = 1.0


def merge(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], configs: Callable[[str], Config], run: Run
) -> dict[str, LazyTensor]:
    return fuse(Rule(weighted, given=lambda name: {"weight": [configs(name).scale]}), names, models)


METHOD = Method(
    paper="mergekit",
    config=Config,
    models={"models": Slot((Weights,), help="the model to pass on")},
    run=whole(merge),
    cost=streamed(1),
    agree=agree,
    merge=merge,
)
