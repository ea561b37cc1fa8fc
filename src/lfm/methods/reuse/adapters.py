"""Add LoRA adapters of one base up into one adapter: exactly, or as near as a rank allows.

    ΔW = Σᵢ wᵢ sᵢ BᵢAᵢ = [w₁s₁B₁ … wₙsₙBₙ] [A₁; …; Aₙ]        sᵢ = α/r, with rsLoRA α/√r

Paper: LoRA, arXiv 2106.09685; the sum of changes is task arithmetic, 2212.04089. Without `rank` and `energy` the
factors go side by side: exact, of rank Σ rᵢ. With them the sum is cut to its best approximation (Eckart–Young), by a QR
of the factors and an SVD of the (Σr, Σr) core between; a matrix of the layer's size is never made. Adapters may differ
in modules, ranks, α, rsLoRA, rank and alpha patterns. Biases and modules_to_save θ become θ₀ + Σ wᵢ (θᵢ − θ₀), in which
an adapter that holds none changes nothing; where the base stores no θ₀ they are averaged by weight.

In peft 0.21.2 add_weighted_adapter makes the sum of rsLoRA adapters √(Σr) too large (`cat` and `svd`: the result keeps
use_rslora), saves under rank patterns what it cannot load (`linear`, `ties`), and refuses modules_to_save.

Models: LoRA adapters over one base, the same by digest; linear layers, convolutions without groups, embeddings. The
result is a PEFT adapter with α = r over that base; `checkpoint` is its merged form. Sums are in fp64, rounded once to
fp32. Measured: the largest rank, and the share of ‖ΔW‖²_F kept; of the two adapters that are most alike, the cosine of
their changes, and the largest of any inputs that they act on: 0 where neither meets what the other does. Errors:
MismatchError naming what does not go together; AccessError for DoRA and others that are not W + BA; ConfigError for
weights of another number.

    lfm run reuse.adapters models=adapter1 models=adapter2 --set rank=8 --out both
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Annotated

import lfm.core
from lfm.core import Adaptation, Cost, Inputs, Meta, Method, Model, Run, Sizes, Slot, Weights
from lfm.core.errors import ConfigError
from lfm.fusing.inputs import Weighting, one_each
from lfm.models import combine


class Config(lfm.core.Config, frozen=True):
    weights: Weighting = ()
    normalize: Annotated[bool, Meta(description="divide by the sum of the weights: a mean, not a sum")] = False
    rank: Annotated[int, Meta(ge=0, description="at most this rank in each layer; 0: no limit")] = 0
    energy: Annotated[
        float, Meta(ge=0, le=1, description="the least rank that keeps this share of each ‖ΔW‖²_F; 0: all of it")
    ] = 0.0


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    models = inputs.all("models")
    changes, whole = combine.added(models, _weights(config, len(models)))
    run.note(**_overlap(models))
    if config.rank or config.energy:
        from lfm.tensors.lowrank import cut

        cuts = {
            name: cut(change, config.rank, config.energy)
            for name, change in run.track(changes.items(), "cutting", len(changes))
        }
        changes = {name: found.change for name, found in cuts.items()}
        total = sum(found.energy for found in cuts.values())
        run.note(energy_kept=sum(found.kept for found in cuts.values()) / total if total else 1.0)
    run.note(rank=max((change.a.shape[0] for change in changes.values()), default=0), modules=len(changes))
    return models[0].ask(Adaptation).base.ask(Weights).adapt(changes, whole)


def _overlap(models: Sequence[Model]) -> dict[str, float | str]:
    """What of the adapters most alike is noted; nothing of one alone."""
    found = {
        (one.ref, other.ref): combine.overlap(one.ask(Adaptation).changes(), other.ask(Adaptation).changes())
        for one, other in combinations(models, 2)
    }
    if not found:
        return {}
    (one, other), most = max(found.items(), key=lambda each: (abs(each[1].cosine), each[1].reads))
    return {"overlap": most.cosine, "overlap_reads": most.reads, "overlap_of": f"{one} and {other}"}


def agree(config: Config, inputs: Inputs) -> None:
    _weights(config, len(inputs.all("models")))
    combine.one_base(inputs.all("models"))


def _weights(config: Config, count: int) -> tuple[float, ...]:
    weights = one_each("weights", config.weights, count)
    if config.normalize and not sum(weights):
        raise ConfigError("the weights sum to zero", fix="set normalize=false to add and subtract adapters")
    total = sum(weights) if config.normalize else 1.0
    return tuple(weight / total for weight in weights)


def cost(config: Config, sizes: Sizes) -> Cost:
    models = sizes.models["models"]
    size = models[0].bytes // 50  # an adapter of rank 16 beside layers of 1600: r (in + out) of in · out
    return Cost(flops=4.0 * len(models) ** 2 * size, memory=6 * len(models) * size, disk=len(models) * size)


METHOD = Method(
    paper="arXiv:2106.09685",
    config=Config,
    models={"models": Slot((Adaptation,), max=None, help="LoRA adapters of one base")},
    run=run,
    cost=cost,
    agree=agree,
)
