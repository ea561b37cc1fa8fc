"""Tune the last k blocks and the head, with k chosen on held-out records; deeper layers may learn more slowly.

    θ_l trains for l > L − k, at the rate η · decay^(L − l);   k* = argmin over k of the held-out loss

Paper: Tajbakhsh et al., TMI 2016, arXiv 1706.00712 ("Full training or fine tuning?"), which tunes from the last layer
back until held-out records get no better, and finds that how deep to go depends on how far the new task lies. Rates
that fall with depth are ULMFiT's (1801.06146, section 3.2: decay 1/2.6). Differs: layers are counted in transformer
blocks; without blocks in the layers that hold weights; AdamW.

Models: any with Gradients and a codec. Layers are found by structure: what precedes the blocks (embeddings) trains only
with all of them, what follows (the last norm, the head) always; a head that is the embedding too trains with the head.
Data: every record kind, as its task; dev: what chooses k, needed where `last` is 0. The run's notes hold each k's
held-out loss. Errors: ConfigError where k passes the blocks there are, or nothing chooses it; DivergedError.

    lfm run tune.layerwise model=base train=train.jsonl dev=dev.jsonl --out tuned
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from lfm.core import Codec, Cost, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import ConfigError
from lfm.models.layers import all_blocks, stages
from lfm.train import RECORDS, Fit, suited, taught, training
from lfm.train.examine import examiner

if TYPE_CHECKING:
    from torch import nn


class Config(Fit, frozen=True):
    last: Annotated[int, Meta(ge=0, description="blocks that are tuned, from the last; 0: chosen on dev")] = 0
    decay: Annotated[float, Meta(gt=0, le=1, description="factor on the rate for each block further down")] = 1.0
    lr: Annotated[float, Meta(gt=0, description="peak learning rate (AdamW) of the head")] = 1e-4


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model, records, dev = inputs.model("model"), inputs.records("train"), inputs.records("dev")
    depth = len(parts(model.ask(Gradients).module())) - 2
    if config.last > depth:
        raise ConfigError(f"the last {config.last} blocks are asked for", why=f"it has {depth}", fix=f"last={depth}")
    best: tuple[float, nn.Module] | None = None
    for k in [config.last] if config.last else depths(depth):
        module = model.ask(Gradients).module()
        rates = freeze(module, k, config.decay)
        taught(module, model, records, config, run, dev=dev if config.patience else (), name=f"last {k}", scale=rates)
        loss = examined(model, module, dev) if len(dev) else 0.0
        if len(dev):
            run.note(**{f"held_out_last_{k}": loss})
        if best is None or loss < best[0]:
            best = loss, module
            run.note(last=k)
    assert best is not None
    run.note(trained=sum(p.numel() for p in best[1].parameters() if p.requires_grad))
    return model.ask(Gradients).rewrap(best[1].requires_grad_())


def depths(blocks: int) -> list[int]:
    """What is tried for k: 1, 2, 4, … and all."""
    return sorted({min(2**place, blocks) for place in range(blocks.bit_length() + 1)})


def parts(module: nn.Module) -> list[list[str]]:
    """Names of modules by depth: what precedes the blocks, each block, what follows (either may be empty)."""
    found, blocks = stages(module), all_blocks(module)
    if not blocks:  # each layer counts as one; the last is what follows
        return [[], *([name] for name, part in module.named_modules() if [*part.parameters(recurse=False)])]

    def inside(stage: list[str], block: str) -> bool:
        return any(f"{name}.".startswith(f"{block}.") for name in stage)

    first = next(place for place, stage in enumerate(found) if inside(stage, blocks[0]))
    end = first + len(blocks)
    return [
        [n for s in found[:first] for n in s],
        *found[first:end],
        [name for stage in found[end:] for name in stage],
    ]


def freeze(module: nn.Module, k: int, decay: float) -> Callable[[str], float]:
    """Have only the last k blocks and what follows train, with all blocks all; the factor on each parameter's rate."""
    held = parts(module)
    top = len(held) - 1
    depth = {name: top - place for place, stage in enumerate(held) for name in stage}  # 0: the head
    owners: dict[str, Any] = {}
    for name, part in module.named_modules():
        for own, parameter in part.named_parameters(recurse=False):
            below = depth[name]
            owners[f"{name}.{own}" if name else own] = (parameter, below)
    nearest: dict[int, int] = {}
    for parameter, below in owners.values():  # one that is used twice goes with its last use
        nearest[id(parameter)] = min(nearest.get(id(parameter), below), below)
    rates = {}
    for name, parameter in module.named_parameters():
        below = nearest[id(parameter)]
        parameter.requires_grad_(below <= k or k == top - 1)
        rates[name] = decay**below
    return lambda name: rates[name]


def examined(model: Model, module: nn.Module, dev: Any) -> float:
    """The held-out loss."""
    from lfm.models import forward

    module.eval()
    return examiner(dev, model)(lambda batch: forward(module, batch)).loss


def agree(config: Config, inputs: Inputs) -> None:
    if not config.last and not len(inputs.records("dev")):
        raise ConfigError("nothing chooses how many blocks to tune", fix="dev=FILE with held-out records, or last=K")
    suited(config, inputs)


def cost(config: Config, sizes: Sizes) -> Cost:
    facts = sizes.model("model")
    layers = max(facts.layers, 1)
    tried = [min(config.last, layers)] if config.last else depths(layers)
    each = [training(config, facts, sizes.data["train"], share=k / layers) for k in tried]
    return each[-1]._replace(flops=sum(one.flops for one in each), steps=sum(one.steps for one in each))


METHOD = Method(
    paper="arXiv:1706.00712",
    config=Config,
    models={"model": Slot((Gradients, Codec), help="the model to tune")},
    data=RECORDS,
    agree=agree,
    forms=("checkpoint",),
    run=run,
    cost=cost,
)
