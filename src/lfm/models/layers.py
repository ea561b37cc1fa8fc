"""Which layers a tuning method takes, found by structure: the blocks' projections, the norms, the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lfm.core.errors import ModelError
from lfm.core.heavy import nn
from lfm.models import structure


def all_blocks(module: nn.Module) -> list[str]:
    """Names of the blocks of every stack (an encoder's and a decoder's), outermost lists only, in order."""
    found: list[str] = []
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and not any(name.startswith(block + ".") for block in found):
            found += [f"{name}.{i}" for i, block in enumerate(child) if next(structure.linears(block), None)]
    return found


def projections(module: nn.Module) -> list[str]:
    """Names of the linear layers in the blocks; without blocks, of all linear and convolution layers but the last."""
    blocks = all_blocks(module)
    names = [name for name, *_ in structure.linears(module)]
    if blocks:
        return [name for name in names if any(name.startswith(block + ".") for block in blocks)]
    return [name for name, child in module.named_modules() if isinstance(child, nn.Linear | nn.Conv2d)][:-1] or names


def attention(module: nn.Module) -> list[str]:
    """Names of the linear layers outside the feed-forward layer of every block."""
    return [name for block in all_blocks(module) for name in structure.attention(module, block)]


def downs(module: nn.Module) -> list[str]:
    """Names of the projections that end each block's feed-forward layer."""
    return [structure.feed_forward(module, block).down for block in all_blocks(module)]


def norms(module: nn.Module) -> list[str]:
    """Names of the modules whose only parameters are a gain vector and perhaps a bias."""
    found = []
    for name, child in module.named_modules():
        parameters = dict(child.named_parameters())
        if (
            "weight" in parameters
            and all(p.ndim == 1 for p in parameters.values())
            and set(parameters) <= {"weight", "bias"}
        ):
            found.append(name)
    return found


def heads(module: nn.Module) -> list[str]:
    """Names of what stands beside the body: the children with parameters, less the one with the most."""
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in module.named_children()}
    body = max(sizes, key=lambda name: sizes[name])
    return [name for name, size in sizes.items() if size and name != body]


def biases(module: nn.Module) -> list[str]:
    """Names of the layers of the body that have a bias."""
    beside = tuple(heads(module))
    return [
        name
        for name, child in module.named_modules()
        if isinstance(child._parameters.get("bias"), nn.Parameter) and name and name.split(".")[0] not in beside
    ]


def last_linear(module: nn.Module) -> str:
    """Name of the linear layer that ends in the logits: a language model's output embedding, a classifier's last.

    ModelError where it has none.
    """
    told: Any = getattr(module, "get_output_embeddings", lambda: None)()
    names = [name for name, child, *_ in structure.linears(module) if told is None or child is told]
    if not names:
        raise ModelError(f"no linear layer ends {type(module).__name__}", why="its logits come from another kind")
    return names[-1]


def shares_weights(module: nn.Module, layer: str) -> bool:
    """Whether a parameter of the layer is another's too, as an output embedding that is the input's."""
    own = {id(p) for p in module.get_submodule(layer).parameters()}
    everywhere = [id(p) for _, p in module.named_parameters(remove_duplicate=False)]
    return any(everywhere.count(each) > 1 for each in own)


def stages(module: nn.Module) -> list[list[str]]:
    """Names of the modules that hold parameters themselves: what precedes the blocks, each block, what follows.

    What stands beside several stacks of blocks, between them, precedes. Empty stages are left out.
    """
    holding = [name for name, child in module.named_modules() if [*child.parameters(False), *child.buffers(False)]]
    found = all_blocks(module)
    places = [next((i for i, b in enumerate(found) if f"{n}.".startswith(f"{b}.")), None) for n in holding]
    last = max((at for at, place in enumerate(places) if place is not None), default=-1)
    out: list[list[str]] = [[] for _ in range(len(found) + 2)]
    for at, (name, place) in enumerate(zip(holding, places)):
        out[place + 1 if place is not None else 0 if at < last else -1].append(name)
    return [stage for stage in out if stage]


def shallower(module: nn.Module, count: int) -> nn.Module:
    """The module, changed in place, with `count` of its blocks: the first, the last, and those evenly between.

    ModelError where it has fewer blocks, several stacks of them, or a config that does not say their number.
    """
    held = len(countable(module))
    if not 1 <= count <= held:
        raise ModelError(f"{count} blocks cannot be kept of {held}", fix=f"layers={held} or fewer")
    return with_blocks(module, [round(i * (held - 1) / max(count - 1, 1)) for i in range(count)])


def countable(module: nn.Module) -> list[str]:
    """Names of its blocks, one stack whose number its config says, so that fewer can be kept. ModelError if not."""
    names = all_blocks(module)
    stacks = {name.rsplit(".", 1)[0] for name in names}
    config: Any = getattr(module, "config", None)
    if len(stacks) != 1 or getattr(config, "num_hidden_layers", None) != len(names):
        raise ModelError(
            f"blocks cannot be taken out of {type(module).__name__}",
            why=f"it has {len(stacks)} stacks of blocks" if len(stacks) != 1 else "its config does not count them",
        )
    return names


def with_blocks(module: nn.Module, chosen: Sequence[int]) -> nn.Module:
    """The module, changed in place, with these of its `countable` blocks alone, in their order."""
    names = countable(module)
    config: Any = module.config
    blocks = [module.get_submodule(names[i]) for i in chosen]
    for place, block in enumerate(blocks):
        for child in block.modules():
            if isinstance(getattr(child, "layer_idx", None), int):
                child.layer_idx = place  # type: ignore[assignment]
    parent, _, attribute = names[0].rsplit(".", 1)[0].rpartition(".")
    setattr(module.get_submodule(parent), attribute, nn.ModuleList(blocks))
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == len(names) and key.endswith("layer_types"):
            setattr(config, key, [value[i] for i in chosen])
    config.num_hidden_layers = len(chosen)
    return module
