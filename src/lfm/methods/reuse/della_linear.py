"""Drop fine-tuned models' changes at random, small ones more often than large ones, and add the rest to the base.

    pᵢ = d − ε + 2ε · rank / (width − 1)           probability to be kept, by the magnitude's rank (from 0) in its row
    τᵢ = mᵢ (θᵢ − θ_base) / pᵢ,    mᵢ ~ Bernoulli(pᵢ)
    θ  = θ_base + λ Σᵢ wᵢ τᵢ       (`density` is d, `epsilon` ε, `scale` λ; with `normalize` by Σᵢ wᵢ)

Paper: DELLA-Merging, arXiv 2406.11617, added up without an election of signs; mergekit's della_linear, which does not
divide by pᵢ but multiplies what is left of a tensor by the ratio of its l₁ norms before and after: `rescale` norm. With
none, nothing is grown. Rows run along the last dimension; d = 1 keeps all.

Which entries are dropped depends on the run's seed, the model's place, the tensor's name and the entry alone. Models:
equal architecture, vocabulary, tensor names and shapes, the base's too. The result has the base's files and dtypes;
arithmetic is in fp64 and rounded once. Integer tensors must be equal in all. Tensors are streamed by rows. Errors:
MismatchError before any weight is read; ConfigError for weights, densities or ε of another number, or d ± ε that is not
within (0, 1); CorruptError naming a tensor that holds a NaN or an infinity.

    lfm run reuse.della_linear base=base models=math models=code --set density=[0.4] --set epsilon=[0.1] --out merged
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import lfm.core
from lfm.core import Inputs, Method, Run
from lfm.fusing import Rule, della, fuse
from lfm.fusing.inputs import (
    BASE_AND_TUNED,
    Densities,
    Normalize,
    Scale,
    Tensors,
    Weighting,
    streamed,
    summed,
    whole,
)
from lfm.fusing.joins import added, multiplied

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


class Config(lfm.core.Config, frozen=True):
    density: Densities = (0.3,)
    epsilon: della.Epsilons = (0.1,)
    weights: Weighting = ()
    scale: Scale = 1.0
    rescale: della.Rescale = "probability"
    normalize: Normalize = False


def merge(
    names: Sequence[str], base: Tensors | None, models: Sequence[Tensors], configs: Callable[[str], Config], run: Run
) -> dict[str, LazyTensor]:
    assert base is not None
    changes, grown = della.dropped(names, base, models, configs, run.seed)

    def given(name: str) -> dict[str, Any]:
        return summed(configs(name), len(models)) | {"grow": grown(name)}

    return fuse(Rule(added, first=multiplied, given=given), names, changes, base=base)


def agree(config: Config, inputs: Inputs) -> None:
    della.agree(config.density, config.epsilon, inputs)


METHOD = Method(
    paper="arXiv:2406.11617",
    config=Config,
    models=BASE_AND_TUNED,
    run=whole(merge),
    cost=streamed(200),
    agree=agree,
    merge=merge,
)
