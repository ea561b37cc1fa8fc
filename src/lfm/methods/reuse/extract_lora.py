"""Take what a fine-tuning changed as a LoRA adapter over its base: the nearest of a rank, or that keeps an energy.

    ΔW = W_tuned − W_base ≈ BA,   the first r terms of its singular value decomposition (Eckart–Young)

Paper: LoRA, arXiv 2106.09685, backwards; the decomposition that mergekit-extract-lora makes. Per tensor, the least
rank that keeps the share `energy` of ‖ΔW‖²_F, `rank` at most. Matrices up to 1024 on their short side are decomposed
whole; larger ones by random projections with power iterations (Halko, Martinsson, Tropp, arXiv 0909.4061): with four
of them the squared error was within 0.3 % of the least, on a spectrum so flat that rank 8 of 128 kept 17 % of it.
Linear layers, embeddings and ungrouped convolutions become BA; where the base ties a head to its embeddings, both get
the change. What else changed (norms, biases) goes along whole if PEFT can hold it, or is named with its norm.

Models: a base and its fine-tuning, equal in architecture, tensor names and shapes. The result is a PEFT adapter with
α = r, factors in fp32; `checkpoint` is its merged form. Differences and decompositions are in fp64. Measured: the share
of ‖ΔW‖²_F kept, over all matrices and in the worst; the largest rank; what was left out. Errors: MismatchError before
any weight is read; ModelError where the layers are not known.

    lfm run reuse.extract_lora base=base model=tuned --set rank=16 --out adapter
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import lfm.core
from lfm.core import Cost, Inputs, Layout, LowRank, Meta, Method, Model, Run, Sizes, Slot, Weights
from lfm.core.errors import ConfigError, MismatchError
from lfm.core.heavy import torch
from lfm.models import lora
from lfm.tensors import match

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import LazyTensor


SMALL = 1024
"""Up to this side a matrix is decomposed whole, in half a second of one core."""


class Config(lfm.core.Config, frozen=True):
    rank: Annotated[int, Meta(ge=0, description="at most this rank in each layer; 0: as the energy asks")] = 16
    energy: Annotated[
        float, Meta(ge=0, le=1, description="the least rank that keeps this share of each ‖ΔW‖²_F; 0: as the rank asks")
    ] = 0.0
    iterations: Annotated[int, Meta(ge=0, description="power iterations; 0: the whole decomposition, slower")] = 4
    whole: Annotated[bool, Meta(description="carry norms and biases along; else they are left out, and named")] = True


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    base, model = (inputs.model(role).ask(Weights) for role in ("base", "model"))
    before, after, layout = base.tensors(), model.tensors(), base.layout()
    modules = _modules(base, layout)
    changes: dict[str, LowRank] = {}
    others: dict[str, Tensor] = {}
    kept = energy = 0.0
    worst = (2.0, "")
    for name in run.track(match.floating(before), "decomposing"):
        change = _difference(before[name], after[name])
        if change is None:
            continue
        if name not in modules:
            others[name] = change
            continue
        module, kind = modules[name]
        found = run.step(f"decompose {name}", lambda c=change, k=kind, n=name: _decompose(config, run, c, k, n))
        changes[module] = _like(kind, change)._replace(b=found["b"], a=found["a"])
        kept, energy = kept + found["kept"], energy + found["energy"]
        worst = min(worst, (found["kept"] / found["energy"], name))
    if not changes:
        raise MismatchError(
            f"no matrix differs between {inputs.model('base').ref} and {inputs.model('model').ref}",
            why="an adapter without a change of low rank is none",
        )
    _tie(changes, layout)
    whole = _whole(config, run, others, changes, base, after)
    run.note(energy_kept=kept / energy, least_kept=worst[0], least_kept_in=worst[1])
    run.note(rank=max(change.a.shape[0] for change in changes.values()), modules=len(changes), whole=len(whole))
    return base.adapt(changes, whole)


def _modules(base: Weights, layout: Layout) -> dict[str, tuple[str, str]]:
    """A stored weight → its module and that one's kind, of the kinds that a change of low rank is for."""
    found: dict[str, tuple[str, str]] = {}
    stored_name = lora.naming(base)
    for module, kind in layout.kinds.items():
        weight = f"{module}.weight"
        name = stored_name(weight)
        if name and kind != "grouped convolution" and weight not in layout.tied:
            found[name] = (module, kind)
    return found


def _difference(before: LazyTensor, after: LazyTensor) -> Tensor | None:
    change = after.read().double() - before.read().double()
    return change if bool(change.any()) else None


def _like(kind: str, change: Tensor) -> LowRank:
    """A change without its factors: how the layer stores its weight."""
    empty = torch.empty(0)
    return LowRank(empty, empty, kind in ("conv1d", "embedding"), tuple(change.shape[2:]), kind == "embedding")


def _decompose(config: Config, run: Run, change: Tensor, kind: str, name: str) -> dict[str, Any]:
    from lfm.tensors.lowrank import factored

    like = _like(kind, change)
    matrix = change.T if like.transposed else change.reshape(len(change), -1)
    iterations = config.iterations if min(matrix.shape) > SMALL else 0
    found = factored(matrix, like, config.rank, config.energy, iterations, run.generator("decompose", name))
    return {"b": found.change.b.float(), "a": found.change.a.float(), "kept": found.kept, "energy": found.energy}


def _tie(changes: dict[str, LowRank], layout: Layout) -> None:
    """The change of a weight that layers share, for each of them: beside the base they are adapted one by one."""
    for weight, home in layout.tied.items():
        change, module = changes.get(home.removesuffix(".weight")), weight.removesuffix(".weight")
        if change is not None and layout.kinds.get(module) == "linear" and change.embedding:
            changes[module] = LowRank(change.a.T, change.b.T)
        elif change is not None:
            changes[module] = change


def _whole(
    config: Config, run: Run, others: dict[str, Tensor], changes: Any, base: Weights, after: Any
) -> dict[str, LazyTensor]:
    """The other tensors that changed, as many as an adapter holds. Those left out are noted with their norms."""
    kept: dict[str, LazyTensor] = {}
    out: dict[str, float] = {}
    before, full = base.tensors(), lora.unstored(base)
    stored, tied = [full(name) for name in before], base.layout().tied
    for name, change in others.items():
        shared = full(name) in tied.values() and not name.endswith(".bias")  # a bias is set in place, for both
        if not config.whole or shared or lora.unsayable(full(name), changes, stored):
            out[name] = float(change.norm())
        else:
            kept[full(name)] = after[name]
    for name in before.keys() - set(match.floating(before)):
        if not match.equal(before[name], after[name]):
            out[name] = float("nan")
    if out:
        run.note(left_out=", ".join(f"{name} (‖Δ‖ = {norm:.3g})" for name, norm in sorted(out.items())))
    return kept


def agree(config: Config, inputs: Inputs) -> None:
    if not config.rank and not config.energy:
        raise ConfigError("neither rank nor energy is set", fix="energy=1 keeps all of the change")
    match.agree([inputs.model("base"), inputs.model("model")])


def cost(config: Config, sizes: Sizes) -> Cost:
    facts = sizes.model("base")
    rank = config.rank or 64
    width = max(facts.width, 1)
    matrix = width * max(4 * width, facts.vocabulary)
    flops = 4.0 * facts.parameters * (rank + 16) * (config.iterations + 1 or width)
    return Cost(flops=flops, memory=40 * matrix, disk=facts.parameters * 8 * rank // width)


METHOD = Method(
    paper="arXiv:2106.09685",
    config=Config,
    models={
        "base": Slot((Weights,), help="what the model was fine-tuned from"),
        "model": Slot((Weights,), help="the fine-tuned model"),
    },
    run=run,
    cost=cost,
    agree=agree,
)
