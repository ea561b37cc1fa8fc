"""How each ATen operation passes the axes of what it reads on to what it makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lfm.core.heavy import torch
from lfm.models.axes import Axis, fixed, free, pin, product, unify
from lfm.models.moving import MOVING, Axes, Rule, ruled

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.models.trace import Trace


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


def _expanded(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    return [_joined([t.of(args[0])], outs[0].shape)]


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
    if len(args) > 1 and isinstance(args[1], torch.Tensor):
        return pointwise(t, args, kwargs, outs)  # the greater of two
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


def _grouped(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes] | None:
    """Rows (T, K), in consecutive groups, each by its own matrix of (E, K, N)."""
    a, b = args[:2]
    if (a.dim(), b.dim()) != (2, 3):
        return None
    t.hold([t.of(a)[0], t.of(b)[0]])
    t.multiply(a, 1, b, 1)
    return [(t.of(a)[0], t.of(b)[2])]


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
    **MOVING,
    **ruled(
        "_to_copy clone detach alias contiguous copy lift_fresh lift masked_fill dropout native_dropout", pointwise
    ),
    **ruled("gelu silu relu leaky_relu elu hardtanh hardswish softplus mish clamp where addcmul addcdiv", pointwise),
    **ruled("zeros ones full empty empty_strided zeros_like ones_like full_like empty_like new_zeros new_ones", _made),
    **ruled("new_full new_empty new_empty_strided scalar_tensor fill zero", _made),
    **ruled("expand expand_as", _expanded),
    **ruled("mm addmm", _mm),
    **ruled("bmm baddbmm", _bmm),
    **ruled("mv dot", _mv),
    **ruled("linear", _linear),
    **ruled("convolution _convolution", _convolved),
    **ruled("embedding", _embedded),
    **ruled("native_layer_norm _fused_rms_norm", _layer_normed),
    **ruled("native_group_norm", _group_normed),
    **ruled("native_batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit", _batch_normed),
    **ruled("cudnn_batch_norm _batch_norm_no_update", _batch_normed),
    **ruled("_softmax _log_softmax _safe_softmax softmax log_softmax", _softmaxed),
    **ruled("sum mean amax amin var std var_mean prod any all logsumexp max min", _reduced),
    **ruled("linalg_vector_norm norm", lambda t, args, kwargs, outs: _reduced(t, [args[0], *args[2:]], kwargs, outs)),
    **ruled("max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d max_pool2d", _pooled),
    **ruled("upsample_bilinear2d upsample_nearest2d upsample_bicubic2d", _pooled),
    **ruled("_grouped_mm", _grouped),
}
