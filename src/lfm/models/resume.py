"""The same texts through a module again and again: what the edit cannot change is computed once, and logits only where
they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.errors import ModelError
from lfm.core.heavy import torch
from lfm.core.interfaces import Batch
from lfm.models import forward, structure

if TYPE_CHECKING:
    from torch import Tensor, nn

SAME = 1e-3
"""How far logits may differ, over the largest of them, where blocks are passed over."""


class Begun(NamedTuple):
    """What the blocks of a stack before `upto` put out: hidden (B, T, width), in a tuple or not."""

    upto: int
    hidden: Tensor
    wrapped: bool


@contextmanager
def recording(module: nn.Module, upto: int) -> Iterator[list[Begun]]:
    """A list that a forward inside fills with what the blocks before `upto` put out; empty where there are none, or
    where they put out more than hidden states."""
    found: list[Begun] = []

    def keep(_: Any, __: Any, out: Any) -> None:
        wrapped = isinstance(out, tuple)
        hidden = out[0] if wrapped and len(out) == 1 else out
        if isinstance(hidden, torch.Tensor):
            found[:] = [Begun(upto, hidden.detach(), wrapped)]

    passed = _passed(module, upto)
    handle = module.get_submodule(passed[-1]).register_forward_hook(keep) if passed else None
    try:
        yield found
    finally:
        if handle:
            handle.remove()


@contextmanager
def resumed(module: nn.Module, begun: Begun | None) -> Iterator[None]:
    """Within: the blocks before `upto` are passed over, and give what they gave. None: all are run."""
    passed = [module.get_submodule(name) for name in _passed(module, begun.upto)] if begun else []
    before = [vars(block).get("forward") for block in passed]
    for block in passed:
        assert begun
        block.forward = lambda *_, **__: (begun.hidden,) if begun.wrapped else begun.hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block, own in zip(passed, before):
            del block.forward
            if own is not None:  # a block's that recomputes its activations, say
                block.forward = own


def _passed(module: nn.Module, upto: int) -> list[str]:
    """The blocks before one, numbered through, in its own stack: what an encoder tells its decoder is read anew."""
    first = 0
    for stack in structure.stacks(module):
        if upto <= first + len(stack):
            return stack[: upto - first]
        first += len(stack)
    return []


@contextmanager
def asked_at(module: nn.Module, rows: Tensor, places: Tensor) -> Iterator[None]:
    """Within: only n (row, token) places go through the output embeddings, if there are any, as (1, n, width)."""
    find = getattr(module, "get_output_embeddings", None)
    head = find() if find else None

    def only(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].ndim != 3:
            return None
        hidden = args[0]
        return (hidden[rows.to(hidden.device), places.to(hidden.device)][None], *args[1:])

    handle = head.register_forward_pre_hook(only) if head is not None else None
    try:
        yield
    finally:
        if handle:
            handle.remove()


@contextmanager
def ending_at(module: nn.Module, rows: Tensor, places: Tensor) -> Iterator[None]:
    """Within: the last block's feed-forward layer, where it is one module, reads n (row, token) places alone; what it
    gives elsewhere, which no other block and no asked logits see, is 0."""
    name = _last_feed_forward(module)
    wide: list[tuple[torch.Size, Tensor, Tensor]] = []

    def only(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        wide.clear()
        if len(args) != 1 or args[0].ndim != 3:
            return None
        hidden: Tensor = args[0]
        flat = torch.unique(rows * hidden.shape[1] + places).to(hidden.device)  # twice there, it would be told twice
        wide.append((hidden.shape, flat // hidden.shape[1], flat % hidden.shape[1]))
        return (hidden[wide[0][1:]][None],)

    def back(_: Any, __: Any, out: Any) -> Any:
        if not wide:
            return out
        shape, row, place = wide[0]
        told, *rest = out if isinstance(out, tuple) else (out,)
        whole = told.new_zeros(shape).index_put((row, place), told[0])
        return (whole, *rest) if isinstance(out, tuple) else whole

    layer = module.get_submodule(name) if name else None
    handles = [layer.register_forward_pre_hook(only), layer.register_forward_hook(back)] if layer else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _last_feed_forward(module: nn.Module) -> str:
    """The module inside the last block that holds both its projections; empty where none does."""
    block = structure.all_blocks(module)[-1]
    try:
        found = structure.feed_forward(module, block)
    except ModelError:
        return ""
    name = found.up.rpartition(".")[0]
    return name if name == found.down.rpartition(".")[0] != block else ""


def logits_at(module: nn.Module, batch: Batch, rows: Tensor, places: Tensor) -> Tensor:
    """(n, V) fp32 logits at n (row, token) places."""
    with asked_at(module, rows, places):
        logits = forward(module, batch)
    if logits.shape[:2] == (1, len(rows)):
        return logits[0]
    return logits[rows.to(logits.device), places.to(logits.device)]


class _Enough(Exception):
    """All that was asked for is there."""


@contextmanager
def stopped(module: nn.Module, upto: int | None) -> Iterator[None]:
    """What is within ends where that block would begin. None: it does not."""

    def enough(*_: Any) -> None:
        raise _Enough

    names = structure.all_blocks(module) if upto is not None else []
    held = ExitStack()
    if upto is not None and upto < len(names):
        held.callback(module.get_submodule(names[upto]).register_forward_pre_hook(enough).remove)
    with suppress(_Enough), held:
        yield


def activations(module: nn.Module, batch: Batch, sites: Sequence[tuple[str, int | str]]) -> list[Tensor]:
    """What stands at the sites, without gradients. The module reads no further than the last of them."""
    with torch.no_grad(), structure.watch(module, sites) as seen, ExitStack() as held:

        def enough(*_: Any) -> None:
            if all(each is not None for each in seen):
                raise _Enough

        for where in sites:  # after the hooks that fill the list, for they are called in turn
            name, before = structure.site(module, where)
            target = module.get_submodule(name)
            hook = target.register_forward_pre_hook(enough) if before else target.register_forward_hook(enough)
            held.callback(hook.remove)
        with suppress(_Enough):
            forward(module, batch)
    rows = len(next(iter(batch.values())))
    return [structure.in_rows(each, rows) for each in seen]


def agrees(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= SAME * one.abs().max())
