"""Neurons beside a layer as a plain checkpoint: every feed-forward layer made as wide, with zeros in the other blocks.

A configuration has one width for all blocks of a stack, so all grow by n. What a new column of zeros writes is nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.errors import OutputError
from lfm.core.heavy import torch
from lfm.core.interfaces import Gradients, Weights
from lfm.core.model import Model
from lfm.editing import form
from lfm.models import forward, structure

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.editing.neurons import Neurons

Shapes = Mapping[str, tuple[int, ...]]


class Widths(NamedTuple):
    """A block's linear layers that read the residual width and write the inner one, the first of them being what the
    layer's function works on; and the one back. By their names among the stored tensors."""

    ups: tuple[str, ...]
    down: str
    transposed: bool


def wider(weights: Weights, gradients: Gradients, kept: Neurons) -> Model:
    """The model with the neurons in its own feed-forward layers. OutputError where its architecture has no room."""
    module, layout, count = gradients.module(), weights.layout(), len(kept.keys)
    names, at = form.own_stack(module, kept.block)
    all = [_widths(module, name, layout.renamed) for name in names]
    config = _config(weights, all, structure.feed_forward(module, names[0]).inner, count)
    tensors: dict[str, Any] = dict(weights.tensors())
    for place, block in enumerate(all):
        here = place == at
        keys = kept.keys if here else torch.zeros_like(kept.keys)
        more: list[Tensor] = [keys, *(torch.zeros_like(keys) for _ in block.ups[1:])]
        axis = int(block.transposed)
        # a gate's neuron is multiplied by what the other layer says of it: always 1
        bias = [kept.biases * here, *(torch.full((count,), float(here)) for _ in block.ups[1:])]
        for name, rows, start in zip(block.ups, more, bias, strict=True):
            weight = tensors[f"{name}.weight"].read()
            grown = torch.cat([weight, (rows.T if axis else rows).to(weight.dtype)], axis)
            tensors[f"{name}.weight"] = grown
            old = tensors.get(f"{name}.bias")
            before = old.read() if old is not None else torch.zeros(grown.shape[axis] - count, dtype=weight.dtype)
            tensors[f"{name}.bias"] = torch.cat([before, start.to(before.dtype)])
        weight = tensors[f"{block.down}.weight"].read()
        values = (kept.values if here else torch.zeros_like(kept.values)).to(weight.dtype)
        tensors[f"{block.down}.weight"] = torch.cat([weight, values if block.transposed else values.T], 1 - axis)
        if f"{block.down}.bias" not in tensors and f"{block.down}.bias" in _shapes(weights, config):
            tensors[f"{block.down}.bias"] = torch.zeros(kept.values.shape[1], dtype=weight.dtype)
    return weights.assemble(tensors, config, weights.files())


def _widths(module: nn.Module, block: str, renamed: Mapping[str, str]) -> Widths:
    ffn = structure.feed_forward(module, block)
    act: Any = structure.activation(module, block)
    linears = [(f"{block}.{name}", i, o) for name, _, i, o in structure.linears(module.get_submodule(block))]
    ups = [name for name, i, o in linears if (i, o) == (ffn.width, ffn.inner)]
    seen: dict[str, Tensor] = {}
    hooks = [
        module.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name in ups
    ]
    hooks.append(act.register_forward_pre_hook(lambda _, args: seen.update({"": args[0]})))
    try:
        with torch.no_grad():
            ids = torch.arange(4)[None]  # the embedding of one, of padding, may be 0
            written = {"decoder_input_ids": ids} if len(structure.stacks(module)) > 1 else {}
            forward(module, {"input_ids": ids, **written})
    finally:
        for hook in hooks:
            hook.remove()
    first = [name for name in ups if name in seen and "" in seen and torch.equal(seen[name], seen[""])]
    if len(first) != 1 or len(ups) > 2:
        raise _no_room("its function does not work on what one linear layer says")
    ordered = [*first, *(name for name in ups if name not in first)]

    def stored(name: str) -> str:
        return renamed.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")

    return Widths(tuple(map(stored, ordered)), stored(ffn.down), structure.transposed(module.get_submodule(ffn.down)))


def _config(weights: Weights, all: list[Widths], inner: int, count: int) -> dict[str, Any]:
    """The configuration in which every feed-forward layer has so many columns more, and biases: found by trying each
    setting that may be it."""
    before = dict(weights.layout().tensors)
    config = dict(weights.config())
    biases = {f"{name}.bias" for block in all for name in block.ups}
    if not biases <= set(before):
        allowed = biases | {f"{block.down}.bias" for block in all}
        for changed in _tried(config, [key for key, value in config.items() if value is False], True):
            gained = set(_shapes(weights, changed)) - set(before)
            if biases <= gained | set(before) and gained <= allowed:
                config, before = changed, _shapes(weights, changed)
                break
        else:
            raise _no_room("its feed-forward layers have no biases, and no setting gives them any")
    wanted = dict(before)
    for block in all:
        for name in block.ups:
            wide = before[f"{name}.weight"]
            wanted[f"{name}.weight"] = (wide[0], wide[1] + count) if block.transposed else (wide[0] + count, wide[1])
            wanted[f"{name}.bias"] = (inner + count,)
        wide = before[f"{block.down}.weight"]
        wanted[f"{block.down}.weight"] = (wide[0] + count, wide[1]) if block.transposed else (wide[0], wide[1] + count)
    widths = sorted(
        (key for key, value in config.items() if value in (inner, None)), key=lambda key: config[key] is None
    )
    for changed in _tried(config, widths, inner + count):
        if _shapes(weights, changed) == wanted:
            return changed
    raise _no_room("no setting of its configuration is the width of all its feed-forward layers")


def _tried(config: dict[str, Any], keys: list[str], value: Any) -> Iterator[dict[str, Any]]:
    for key in keys:
        yield config | {key: value}


def _shapes(weights: Weights, config: Mapping[str, Any]) -> Shapes:
    """What is stored under this configuration; nothing where there is no such architecture."""
    try:
        return dict(weights.assemble({}, config, {}).ask(Weights).layout().tensors)
    except Exception:  # a setting that is not the width may be anything
        return {}


def _no_room(why: str) -> OutputError:
    return OutputError(
        "this architecture cannot take the neurons as a plain checkpoint",
        why=why,
        fix="leave --format out: the program says the same",
    )
