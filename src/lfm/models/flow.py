"""How each ATen operation passes the axes of what it reads on to what it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lfm.core.heavy import torch
from lfm.models.axes import Axis, cut, fixed, free, pin, product, total, unify, viewed

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.models.trace import Trace

Axes = tuple[Axis, ...]
Rule = Callable[["Trace", Sequence[Any], dict[str, Any], list[Any]], "Sequence[Axes] | None"]
"""(trace, arguments, keyword arguments, outputs) → the axes of each output; None: not told, so all that it touches is
pinned."""


def tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the values, and in lists of them."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += tensors(value)
    return found


def _joined(all_axes: Sequence[Axes], shape: Sequence[int]) -> Axes:
    """The axes of a broadcast result: what is not of size one is one axis."""
    made: list[Axis] = []
    for back in range(len(shape), 0, -1):
        same = [axes[-back] for axes in all_axes if len(axes) >= back and axes[-back].size == shape[-back]]
        for other in same[1:]:
            unify(same[0], other)
        made.append(same[0] if same else Axis(shape[-back]))
    return tuple(made)


def pointwise(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    given = [t.of(x) for x in tensors([*args, *kwargs.values()])]
    return [_joined(given, out.shape) for out in outs]


def _made(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    return [free(out.shape) for out in outs]  # one value everywhere


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


def _expanded(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    return [_joined([t.of(args[0])], outs[0].shape)]


def _repeated(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    times, axes = args[1], t.of(args[0])
    axes = (*fixed([1] * (len(times) - len(axes))), *axes)
    return [tuple(product([Axis(k), axis]) for k, axis in zip(times, axes))]


def _selected(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    """select and unbind: which element is taken is told, so none may move."""
    axes, dim = list(t.of(args[0])), args[1] if len(args) > 1 else 0
    pin(axes.pop(dim))
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


def _mm(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    *bias, a, b = args[:3] if len(args) > 2 else args
    t.multiply(a, 1, b, 0)
    made = (t.of(a)[0], t.of(b)[1])
    return [_joined([made, *(t.of(x) for x in bias)], outs[0].shape)]


def _bmm(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    *bias, a, b = args[:3] if len(args) > 2 else args
    t.multiply(a, 2, b, 1, [(0, 0)])
    made = (t.of(a)[0], t.of(a)[1], t.of(b)[2])
    return [_joined([made, *(t.of(x) for x in bias)], outs[0].shape)]


def _mv(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    t.multiply(args[0], args[0].dim() - 1, args[1], 0)
    return [t.of(args[0])[:-1]]


def _linear(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    x, weight, *bias = args
    t.multiply(x, x.dim() - 1, weight, 1)
    made = (*t.of(x)[:-1], t.of(weight)[0])
    return [_joined([made, *(t.of(b) for b in bias if b is not None)], outs[0].shape)]


def _convolved(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes] | None:
    x, weight, bias, *_, turned, _, groups = args[:9]
    image, kernel = t.of(x), t.of(weight)
    t.hold([*image[2:], *kernel[2:]])
    if turned and groups > 1:
        return None
    if groups == 1:
        t.multiply(x, 1, weight, 0 if turned else 1)
        channels = kernel[1] if turned else kernel[0]
    else:
        group = Axis(groups)
        unify(image[1], product([group, kernel[1]]))
        unify(kernel[0], channels := product([group, Axis(kernel[0].size // groups)]))
        t.tied.append(image[1])
    if bias is not None:
        unify(channels, t.of(bias)[0])
    return [(image[0], channels, *fixed(outs[0].shape[2:]))]


def _embedded(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    rows, width = t.of(args[0])
    pin(rows)
    return [(*t.of(args[1]), width)]


def _layer_normed(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    x, shape, *scales = args
    axes = t.of(x)
    over = axes[-len(shape) :]
    for scale in scales[:2]:
        if isinstance(scale, torch.Tensor):
            for a, b in zip(over, t.of(scale)):
                unify(a, b)
    t.mixed.append((over, axes))
    kept = (*axes[: -len(shape)], *fixed([1] * len(shape)))
    return [axes, *[kept if outs[i].dim() == x.dim() else kept[: outs[i].dim()] for i in range(1, len(outs))]]


def _group_normed(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    x, weight, bias, _, _, _, groups = args[:7]
    axes = t.of(x)
    unify(axes[1], product([Axis(groups), within := Axis(axes[1].size // groups)]))
    for scale in (weight, bias):
        if scale is not None:
            unify(axes[1], t.of(scale)[0])
    t.hold(axes[2:])
    t.mixed.append(((within, *axes[2:]), axes))
    return [axes, *[fixed(out.shape) for out in outs[1:]]]


def _batch_normed(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    axes = t.of(args[0])
    for scale in args[1:5]:
        if isinstance(scale, torch.Tensor):
            unify(axes[1], t.of(scale)[0])
    return [axes, *[(axes[1],) if tuple(o.shape) == (axes[1].size,) else fixed(o.shape) for o in outs[1:]]]


def _softmaxed(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    axes = t.of(args[0])
    if axes:
        t.mixed.append(((axes[args[1]],), axes))
    return [axes]


def _reduced(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes] | None:
    """Sums, means and the like: the same whatever the order. Of several dimensions, all or those named."""
    axes = t.of(args[0])
    dims = kwargs.get("dim", next((a for a in args[1:] if isinstance(a, list | tuple)), None))
    if dims is None and len(args) > 1 and isinstance(args[1], int) and not isinstance(args[1], bool):
        dims = [args[1]]
    gone = {d % len(axes) for d in dims} if dims else set(range(len(axes)))
    if len(outs) > 1 and any(not out.is_floating_point() for out in outs):
        return None  # where the largest lies depends on the order
    t.mixed.append((tuple(axes[d] for d in sorted(gone)), axes))
    kept = outs[0].dim() == len(axes)
    made = tuple(Axis(1) if d in gone else axis for d, axis in enumerate(axes) if kept or d not in gone)
    return [made] * len(outs)


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


def _pooled(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    """Pooling, resizing: what changes size, and every dimension behind the channels, is pinned."""
    axes = t.of(args[0])
    t.hold(axes[2:])
    made = []
    for axis, size in zip(axes, outs[0].shape):
        if axis.size != size:
            pin(axis)
        made.append(axis if axis.size == size else Axis(size, True))
    return [tuple(made)] * len(outs)


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


def _grouped(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes] | None:
    """Rows (T, K), in consecutive groups, each by its own matrix of (E, K, N)."""
    a, b = args[:2]
    if (a.dim(), b.dim()) != (2, 3):
        return None
    t.hold([t.of(a)[0], t.of(b)[0]])
    t.multiply(a, 1, b, 1)
    return [(t.of(a)[0], t.of(b)[2])]


def _complex(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    axes = t.of(args[0])
    if outs[0].dim() > len(axes):
        return [(*axes, Axis(2, True))]
    pin(axes[-1])
    return [axes[:-1]]


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


def _ruled(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


VIEWS = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "flatten",
        "unsqueeze",
        "squeeze",
        "t",
        "transpose",
        "permute",
        "expand",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "unbind",
        "detach",
        "alias",
        "_to_copy",
        "clone",
        "contiguous",
    ]
)

RULES: dict[str, Rule] = {
    **_ruled(
        "_to_copy clone detach alias contiguous copy lift_fresh lift masked_fill dropout native_dropout", pointwise
    ),
    **_ruled("gelu silu relu leaky_relu elu hardtanh hardswish softplus mish clamp where addcmul addcdiv", pointwise),
    **_ruled("zeros ones full empty empty_strided zeros_like ones_like full_like empty_like new_zeros new_ones", _made),
    **_ruled("new_full new_empty new_empty_strided scalar_tensor fill zero", _made),
    **_ruled("view _unsafe_view reshape _reshape_alias flatten unsqueeze squeeze unflatten", _view),
    **_ruled("t transpose swapaxes", _transposed),
    **_ruled("permute", _permuted),
    **_ruled("expand expand_as", _expanded),
    **_ruled("repeat", _repeated),
    **_ruled("select unbind", _selected),
    **_ruled("slice", _sliced),
    **_ruled("split split_with_sizes chunk", _split),
    **_ruled("cat", _concatenated),
    **_ruled("stack", _stacked),
    **_ruled("mm addmm", _mm),
    **_ruled("bmm baddbmm", _bmm),
    **_ruled("mv dot", _mv),
    **_ruled("linear", _linear),
    **_ruled("convolution _convolution", _convolved),
    **_ruled("embedding", _embedded),
    **_ruled("native_layer_norm _fused_rms_norm", _layer_normed),
    **_ruled("native_group_norm", _group_normed),
    **_ruled("native_batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit", _batch_normed),
    **_ruled("cudnn_batch_norm _batch_norm_no_update", _batch_normed),
    **_ruled("_softmax _log_softmax _safe_softmax softmax log_softmax", _softmaxed),
    **_ruled("sum mean amax amin var std var_mean prod any all logsumexp max min", _reduced),
    **_ruled("linalg_vector_norm norm", lambda t, args, kwargs, outs: _reduced(t, [args[0], *args[2:]], kwargs, outs)),
    **_ruled("cumsum cumprod flip", _ordered),
    **_ruled("roll", _rolled),
    **_ruled("tril triu", _triangular),
    **_ruled("max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d max_pool2d", _pooled),
    **_ruled("upsample_bilinear2d upsample_nearest2d upsample_bicubic2d", _pooled),
    **_ruled("constant_pad_nd", _padded),
    **_ruled("index", _indexed),
    **_ruled("index_select", _picked),
    **_ruled("index_put", _put_at),
    **_ruled("gather", _gathered),
    **_ruled("_grouped_mm", _grouped),
    **_ruled("view_as_complex view_as_real", _complex),
    **_ruled("topk", _ranked),
    **_ruled("index_add", _added_at),
}
