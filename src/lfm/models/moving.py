"""How operations that only move elements about pass axes on: views, cuts, joins, picking by number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lfm.core.heavy import torch
from lfm.models.axes import Axis, cut, fixed, pin, product, total, unify, viewed

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.models.trace import Trace

Axes = tuple[Axis, ...]
Rule = Callable[["Trace", Sequence[Any], dict[str, Any], list[Any]], "Sequence[Axes] | None"]
"""(trace, arguments, keyword arguments, outputs) → the axes of each output; None: not told, so all that it touches is
pinned."""


def ruled(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


def _view(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    own = t.of(args[0])
    same = tuple(outs[0].shape) == tuple(args[0].shape)
    return [own if same else viewed(own, outs[0].shape)]


def _transposed(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    axes = list(t.of(args[0]))
    i, j = (args[1], args[2]) if len(args) > 1 else (0, -1)
    if len(axes) > 1:
        axes[i], axes[j] = axes[j], axes[i]
    return [tuple(axes)]


def _permuted(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    axes = t.of(args[0])
    return [tuple(axes[i] for i in args[1])]


def _repeated(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    times, axes = args[1], t.of(args[0])
    axes = (*fixed([1] * (len(times) - len(axes))), *axes)
    return [tuple(product([Axis(k), axis]) for k, axis in zip(times, axes))]


def _selected(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    """select and unbind: which element is taken is told, so none may move."""
    axes, dim = list(t.of(args[0])), args[1] if len(args) > 1 else 0
    taken = axes.pop(dim)
    for out in outs:
        t.owe(out, taken)
    return [tuple(axes)] * len(outs)


def _sliced(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    _, dim, start, _, step = (*args, *(None, 0, None, None, 1)[len(args) :])
    axes, dim = list(t.of(args[0])), dim or 0
    size, taken = axes[dim].size, outs[0].shape[dim]
    if taken == size:
        return [tuple(axes)]
    begin = min(max((start or 0) + (size if (start or 0) < 0 else 0), 0), size)
    if step != 1 or not taken:
        pin(axes[dim])
        axes[dim] = Axis(taken, True)
    else:
        ends = [e for e in (begin, begin + taken, size) if e]
        pieces = cut(axes[dim], sorted(set(ends)))
        axes[dim] = pieces[1] if begin else pieces[0]
    return [tuple(axes)]


def _split(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    axes = t.of(args[0])
    dim, ends, done = dim % len(axes), [], 0
    for out in outs:
        done += out.shape[dim]
        ends.append(done)
    if any(not out.shape[dim] for out in outs):
        t.hold(axes)
        return [fixed(out.shape) for out in outs]
    return [(*axes[:dim], piece, *axes[dim + 1 :]) for piece in cut(axes[dim], ends)]


def _concatenated(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    parts = [t.of(x) for x in args[0] if x.numel()]
    dim %= outs[0].dim()
    if not parts:
        return [fixed(outs[0].shape)]
    for other in parts[1:]:
        for place, (a, b) in enumerate(zip(parts[0], other)):
            if place != dim:
                unify(a, b)
    return [(*parts[0][:dim], total([axes[dim] for axes in parts]), *parts[0][dim + 1 :])]


def _stacked(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    parts = [t.of(x) for x in args[0]]
    for other in parts[1:]:
        for a, b in zip(parts[0], other):
            unify(a, b)
    axes = list(parts[0])
    axes.insert(dim % outs[0].dim(), Axis(len(parts), True))
    return [tuple(axes)]


def _ordered(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    """cumsum, flip: the order along the dimensions that are named counts."""
    axes = t.of(args[0])
    for dim in [args[1]] if isinstance(args[1], int) else args[1]:
        pin(axes[dim])
    return [axes]


def _rolled(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    axes = t.of(args[0])
    for dim in (args[2] if len(args) > 2 else []) or range(len(axes)):
        pin(axes[dim])
    return [axes]


def _triangular(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    axes = t.of(args[0])
    t.hold(axes[-2:])
    return [axes]


def _padded(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    axes = list(t.of(args[0]))
    for place in range(len(args[1]) // 2):
        if any(args[1][2 * place : 2 * place + 2]):
            dim = len(axes) - 1 - place
            pin(axes[dim])
            axes[dim] = Axis(outs[0].shape[dim], True)
    return [tuple(axes)]


def _indexed(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes] | None:
    axes, between = t.of(args[0]), _indices(t, args[0], args[1])
    if between is None:
        return None
    start, end = between
    new = outs[0].dim() - (len(axes) - (end - start))
    return [(*axes[:start], *fixed(outs[0].shape[start : start + new]), *axes[end:])]


def _indices(t: Trace, x: Tensor, indices: Sequence[Tensor | None]) -> tuple[int, int] | None:
    """Pins the indexed dimensions: those from the first to before the second number. None where others lie between."""
    axes, where = t.of(x), [i for i, index in enumerate(indices) if index is not None]
    masks = [index for index in indices if index is not None and index.dtype == torch.bool]
    if not where or where != list(range(where[0], where[-1] + 1)) or (masks and len(where) > 1):
        return None
    end = where[0] + masks[0].dim() if masks else where[-1] + 1
    t.hold(axes[where[0] : end])
    for i in where:
        t.hold(t.of(indices[i]))  # type: ignore[arg-type]
    return where[0], end


def _put_at(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes] | None:
    axes, between = t.of(args[0]), _indices(t, args[0], args[1])
    if between is None or between[0]:
        return None
    rest, given = axes[between[1] :], t.of(args[2])
    t.hold(given[: max(len(given) - len(rest), 0)])
    for a, b in zip(rest[::-1], given[::-1]):
        if b.size > 1:
            unify(a, b)
    return [axes]


def _picked(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    axes, dim = list(t.of(args[0])), args[1]
    pin(axes[dim])
    t.hold(t.of(args[2]))
    axes[dim] = Axis(outs[0].shape[dim], True)
    return [tuple(axes)]


def _added_at(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    axes, dim, added = t.of(args[0]), args[1], t.of(args[3])
    for place, (a, b) in enumerate(zip(axes, added)):
        if place == dim % len(axes):
            t.hold([a, b])
        else:
            unify(a, b)
    return [axes]


def _gathered(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    x, dim, index = t.of(args[0]), args[1], t.of(args[2])
    for place, (a, b) in enumerate(zip(x, index)):
        if place == dim % max(len(x), 1) or a.size != b.size:
            t.hold([a, b])
        else:
            unify(a, b)
    return [index]


def _ranked(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    """The k greatest: which come out is told, so none along the dimension may move."""
    axes, dim = list(t.of(args[0])), args[2] if len(args) > 2 else kwargs.get("dim", -1)
    pin(axes[dim])
    axes[dim] = Axis(outs[0].shape[dim], True)
    return [tuple(axes)] * len(outs)


def _complex(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    axes = t.of(args[0])
    if outs[0].dim() > len(axes):
        return [(*axes, Axis(2, True))]
    pin(axes[-1])
    return [axes[:-1]]


MOVING: dict[str, Rule] = {
    **ruled("view _unsafe_view reshape _reshape_alias flatten unsqueeze squeeze unflatten", _view),
    **ruled("t transpose swapaxes", _transposed),
    **ruled("permute", _permuted),
    **ruled("repeat", _repeated),
    **ruled("select unbind", _selected),
    **ruled("slice", _sliced),
    **ruled("split split_with_sizes chunk", _split),
    **ruled("cat", _concatenated),
    **ruled("stack", _stacked),
    **ruled("cumsum cumprod flip", _ordered),
    **ruled("roll", _rolled),
    **ruled("tril triu", _triangular),
    **ruled("constant_pad_nd", _padded),
    **ruled("index", _indexed),
    **ruled("index_select", _picked),
    **ruled("index_put", _put_at),
    **ruled("gather", _gathered),
    **ruled("view_as_complex view_as_real", _complex),
    **ruled("topk", _ranked),
    **ruled("index_add", _added_at),
}
