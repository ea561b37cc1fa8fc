"""Where things are inside a transformer, found by structure: module types, shapes, and the order of calls.

Works for decoder and encoder stacks whose blocks are entries of one ModuleList. No family's name is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.errors import ModelError
from lfm.core.heavy import nn, torch

if TYPE_CHECKING:
    from torch import Tensor


class FeedForward(NamedTuple):
    """A block's feed-forward layer by its projections' qualified names: up reads its input, down writes its output."""

    up: str
    down: str
    width: int  # of the residual stream
    inner: int  # of the key that down reads


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Module, int, int]]:
    """(name, module, in, out) of every linear layer, 1-d convolutions of GPT-2's kind (weight (in, out)) included."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            yield name, child, child.in_features, child.out_features
        elif type(child).__name__ == "Conv1D" and isinstance(child.weight, torch.Tensor) and child.weight.ndim == 2:
            yield name, child, child.weight.shape[0], child.weight.shape[1]


def transposed(layer: nn.Module) -> bool:
    """Whether the layer's weight is stored (in, out) rather than (out, in)."""
    return not isinstance(layer, nn.Linear)


def blocks(module: nn.Module) -> list[str]:
    """Qualified names of the blocks, in order: the entries of the longest ModuleList whose entries are of one type.

    Of two equally long ones (an encoder and a decoder) the later, which writes the output, is taken.
    """
    best: list[str] = []
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and len(child) and len({type(c) for c in child}) == 1:
            inside = bool(best) and name.startswith(best[0].rsplit(".", 1)[0] + ".")  # experts or heads of a block
            if not inside and len(child) >= len(best) and next(linears(child[0]), None):
                best = [f"{name}.{i}" for i in range(len(child))]
    if not best:
        raise ModelError(
            f"no stack of blocks in {type(module).__name__}", why="its layers are not entries of one ModuleList"
        )
    return best


def levels(module: nn.Module) -> list[str]:
    """Names of what follows one another in depth: the blocks, or, where there are none (a convolutional network), the
    entries of all outermost lists and sequences of layers of one type. ModelError where there is neither."""
    try:
        return blocks(module)
    except ModelError:
        found: list[str] = []
        for name, child in module.named_modules():
            if not isinstance(child, nn.ModuleList | nn.Sequential) or len({type(c) for c in child}) != 1:
                continue
            if not any(name.startswith(f"{level}.") for level in found) and next(child.parameters(), None) is not None:
                found += [f"{name}.{i}" for i in range(len(child))]
        if not found:
            raise
        return found


def stacks(module: nn.Module) -> list[list[str]]:
    """Names of the blocks, stack by stack, in the order that a text passes them: an encoder's and a decoder's, or the
    one stack there is."""
    config: Any = getattr(module, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return [blocks(module)]
    names = {id(child): name for name, child in module.named_modules()}
    parts = [find() for find in (module.get_encoder, module.get_decoder)]  # type: ignore[operator,union-attr]
    return [[f"{names[id(part)]}.{name}" for name in blocks(part)] for part in parts]


def all_blocks(module: nn.Module) -> list[str]:
    """The blocks of all stacks, numbered through: an encoder's first."""
    return [name for stack in stacks(module) for name in stack]


def feed_forward(module: nn.Module, block: str) -> FeedForward:
    """The FFN of a block: down is its widest projection back to the residual width, up the first that feeds down.

    An up that holds its gate too is twice as wide as what down reads; nothing is beside the two then.
    """
    inside = [(f"{block}.{n}", i, o) for n, _, i, o in linears(module.get_submodule(block))]
    width = _width(inside)
    downs = [(i, place, name) for place, (name, i, o) in enumerate(inside) if o == width and i != width]
    for inner, _, down in sorted(downs, reverse=True):
        beside = {name for name, _, _ in inside if name.rpartition(".")[0] == down.rpartition(".")[0]}
        ups = [name for name, i, o in inside if i == width and o == inner]
        ups += [name for name, i, o in inside if i == width and o == 2 * inner and beside == {name, down}]
        up = next(iter(ups), None)
        if up:
            return FeedForward(up, down, width, inner)
    raise ModelError(
        f"no feed-forward layer in {block}",
        why="no pair of linear layers goes from the residual width and back (a mixture of experts keeps them fused)",
    )


def activations(module: nn.Module) -> list[nn.Module]:
    """The activation functions inside: modules without weights that work on each number by itself."""
    probe = torch.linspace(-3.0, 3.0, 7)
    found: list[nn.Module] = []
    for child in module.modules():
        home = type(child).__module__
        if not home.startswith("transformers.activations") and home != "torch.nn.modules.activation":
            continue
        if next(child.children(), None) is not None or any(True for _ in child.parameters()):
            continue
        # many numbers at once round otherwise than one
        if torch.allclose(child(probe), torch.cat([child(x) for x in probe.split(1)]), atol=1e-5):
            found.append(child)
    return found


def activation(module: nn.Module, block: str) -> Callable[[Tensor], Tensor]:
    """The function between a feed-forward layer's projections: the block's one activation function. ModelError where
    there is none, or several that differ."""
    probe, found = torch.linspace(-3.0, 3.0, 7), activations(module.get_submodule(block))
    if not found or any(not torch.equal(found[0](probe), child(probe)) for child in found[1:]):
        raise ModelError(
            f"no activation function in {block}",
            why=f"{len(found)} modules work on numbers one by one" if found else "it is a function and no module",
        )
    return found[0]


def attention(module: nn.Module, block: str) -> list[str]:
    """Names of the block's linear layers outside its feed-forward layer."""
    inner = feed_forward(module, block)
    return [
        f"{block}.{n}"
        for n, _, i, o in linears(module.get_submodule(block))
        if (inner.inner not in (i, o) or (i == o == inner.width)) and f"{block}.{n}" != inner.up
    ]


def attention_out(module: nn.Module, block: str) -> str:
    """The projection that ends a block's attention: the last of its attention's linear layers that writes the residual
    width."""
    width = feed_forward(module, block).width
    names = [name for name in attention(module, block) if _writes(module.get_submodule(name)) == width]
    if not names:
        raise ModelError(
            f"no attention in {block}", why="no linear layer outside its feed-forward layer writes its width"
        )
    return names[-1]


def _writes(layer: nn.Module) -> int:
    return int(layer.weight.shape[1 if transposed(layer) else 0])  # type: ignore[union-attr,index]


def _width(inside: list[tuple[str, int, int]]) -> int:
    """The residual width: what most linear layers of a block read or write."""
    counts: dict[int, int] = {}
    for _, i, o in inside:
        counts[i] = counts.get(i, 0) + 1
        counts[o] = counts.get(o, 0) + 1
    return max(counts, key=lambda w: (counts[w], -w)) if counts else 0


def site(module: nn.Module, where: tuple[str, int | str]) -> tuple[str, bool]:
    """(submodule's name, whether its *input* is meant) of a block's site: hidden, before, ffn_in, ffn_key, ffn_out,
    attention_key or attention_out. The block by its place in `blocks`, or by name. level: hidden, among `levels`."""
    kind, index = where
    if isinstance(index, str):
        block = index
    else:
        stack = levels(module) if kind == "level" else blocks(module)
        if not -len(stack) <= index < len(stack):
            raise ModelError(f"no block {index}", why=f"the model has {len(stack)}")
        block = stack[index]
    if kind in ("hidden", "before", "level"):
        return block, kind == "before"
    if kind in ("attention_out", "attention_key"):
        return attention_out(module, block), kind == "attention_key"
    ffn = feed_forward(module, block)
    if kind == "ffn_in":
        return ffn.up, True
    if kind == "ffn_key":
        return ffn.down, True
    if kind == "ffn_out":
        return ffn.down, False
    raise ModelError(f"no site {kind!r}", fix="sites: hidden, ffn_in, ffn_key, ffn_out, attention_out, level")


def in_rows(activations: Tensor, rows: int) -> Tensor:
    """(B, T, width) of what a module put out, though it was for all tokens in a row (B · T, width), as OPT's are."""
    return activations.reshape(rows, -1, activations.shape[-1]) if activations.ndim == 2 else activations


@contextmanager
def watch(module: nn.Module, sites: Sequence[tuple[str, int | str]]) -> Iterator[list[Tensor]]:
    """A list that each forward inside the block fills with the activations at the sites, in their order."""
    seen: list[Any] = [None] * len(sites)
    handles = []

    def keep(place: int, value: Any) -> None:
        seen[place] = value[0] if isinstance(value, tuple) else value

    for place, where in enumerate(sites):
        name, before = site(module, where)
        target = module.get_submodule(name)
        if before:
            handles.append(target.register_forward_pre_hook(lambda _, args, *, p=place: keep(p, args[0])))
        else:
            handles.append(target.register_forward_hook(lambda _, __, out, *, p=place: keep(p, out)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
