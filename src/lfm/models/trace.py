"""One forward pass, followed operation by operation: which axes of which weights must be permuted together.

Each rule says how an ATen operation passes axes on. An operation without a rule pins every axis it touches, and so does
whatever enters from outside (inputs, constants) and what comes out (logits): an unknown model is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from lfm.core.heavy import torch
from lfm.models.axes import Axis, UnclearError, cut, fixed, free, leaves, pin, product, total, unify, viewed
from lfm.models.device import forward

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.model import Batch

Axes = tuple[Axis, ...]


@final
@dataclass
class Trace:
    """What a pass showed. weights: axes of each parameter and floating buffer, by name.

    seen: the axes of every tensor; mixed: (axes an operation mixes, all axes of its tensor): softmax, norms;
    tied: axes along which two activations are multiplied; reads: (activation, its axes, the axis that is contracted
    with a weight) in the order of the pass; contracted: the weights' axes that are read so.
    """

    weights: dict[str, Axes]
    seen: list[Axes] = field(default_factory=list)
    mixed: list[tuple[Axes, Axes]] = field(default_factory=list)
    tied: list[Axis] = field(default_factory=list)
    reads: list[tuple[Tensor, Axes, Axis]] = field(default_factory=list)
    contracted: list[Axis] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    _axes: dict[int, Axes] = field(default_factory=dict)
    _kept: list[Tensor] = field(default_factory=list)  # an id is a tensor's own only while the tensor lives
    _storages: dict[int, list[str]] = field(default_factory=dict)
    _stored: set[int] = field(default_factory=set)  # ids of weights and of their views
    _reached: set[str] = field(default_factory=set)

    def put(self, tensor: Tensor, axes: Iterable[Axis]) -> None:
        axes = tuple(axes)
        if id(tensor) in self._axes:  # written in place
            for old, new in zip(self._axes[id(tensor)], axes):
                unify(old, new)
            return
        self._axes[id(tensor)] = axes
        self._kept.append(tensor)
        self.seen.append(axes)

    def of(self, tensor: Tensor) -> Axes:
        """The tensor's axes. One that no operation made comes from outside: pinned, with the weight it is a view of."""
        if id(tensor) not in self._axes:
            for name in self._storages.get(_storage(tensor), ()):
                self.hold(self.weights[name])
            self.put(tensor, fixed(tensor.shape))
        for name in self._storages.get(_storage(tensor), ()):
            self._reached.add(name)
        return self._axes[id(tensor)]

    def hold(self, axes: Iterable[Axis]) -> None:
        for axis in axes:
            pin(axis)

    def multiply(self, a: Tensor, i: int, b: Tensor, j: int, batch: Sequence[tuple[int, int]] = ()) -> None:
        """Dimension i of a is contracted with j of b; pairs of `batch` run beside each other."""
        one, other = self.of(a), self.of(b)
        unify(one[i], other[j])
        for k, l in batch:
            unify(one[k], other[l])
        weights = [x for x in (a, b) if id(x) in self._stored]
        if len(weights) == 1:
            x, axis = (a, one[i]) if weights[0] is b else (b, other[j])
            self.reads.append((x, self.of(x), axis))
            self.contracted.append(other[j] if weights[0] is b else one[i])
        else:
            self.tied += [one[i], *(one[k] for k, _ in batch)]


def trace(module: nn.Module, batch: Batch) -> Trace:
    """Follow the module's forward pass over the batch, in eval mode and without gradients. Changes nothing."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    followed = _begun(module)

    class Following(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            _follow(followed, func, args, kwargs or {}, out)
            return out

    class Leaving(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") in OUTSIDE:
                for tensor in _tensors(args[:1]):
                    followed.hold(followed.of(tensor))
            return func(*args, **(kwargs or {}))

    was = module.training
    module.eval()
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Following(), Leaving():
            logits = forward(module, batch)
    finally:
        module.train(was)
    followed.hold(followed.of(logits))
    for name, axes in followed.weights.items():
        if name not in followed._reached:  # never used, or in a way that no operation told
            followed.hold(axes)
    return followed


OUTSIDE = frozenset(["numpy", "__array__", "tolist", "__dlpack__", "data_ptr"])
"""How values leave for where no operation is seen."""


def _begun(module: nn.Module) -> Trace:
    found = Trace({})
    kept = set(module.state_dict())
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        axes = free(tensor.shape) if name in kept else fixed(tensor.shape)
        found.put(tensor, axes)
        found.weights[name] = axes
        found._stored.add(id(tensor))
        found._storages.setdefault(_storage(tensor), []).append(name)
    found._storages.pop(-1, None)
    shared = [names for names in found._storages.values() if len(names) > 1]
    for name in {name for names in shared for name in names}:  # views of one storage: no axis is theirs alone
        found.hold(found.weights[name])
    return found


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr() or -1
    except (RuntimeError, NotImplementedError):
        return -1


def _follow(t: Trace, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    name = func._schema.name
    known = name.removeprefix("aten::").removesuffix("_")
    outs = [o for o in (out if isinstance(out, tuple | list) else (out,)) if isinstance(o, torch.Tensor)]
    rule = RULES.get(known) if name.startswith("aten::") else None
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = _pointwise
    try:
        made = rule(t, args, kwargs, outs) if rule else None
    except UnclearError:
        made = None
    if made is None or any([a.size for a in axes] != list(o.shape) for axes, o in zip(made, outs)):
        made = [fixed(o.shape) for o in outs]
        for tensor in _tensors([*args, *kwargs.values()]):
            if any(not leaf.pinned for axis in t.of(tensor) for leaf in leaves(axis)):
                t.unknown.add(name)
            t.hold(t.of(tensor))
    for tensor, axes in zip(outs, made):
        t.put(tensor, axes)
    sources = [x for x in args if isinstance(x, torch.Tensor)]
    if known in VIEWS and sources and id(sources[0]) in t._stored:
        t._stored |= {id(o) for o in outs}


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found


# ---------------------------------------------------------------------------------------------- rules
# (trace, arguments, outputs) → the axes of each output; None: pin everything

Rule = Callable[[Trace, Sequence[Any], dict[str, Any], list[Any]], "Sequence[Axes] | None"]


def _joined(all_axes: Sequence[Axes], shape: Sequence[int]) -> Axes:
    """The axes of a broadcast result: what is not of size one is one axis."""
    made: list[Axis] = []
    for back in range(len(shape), 0, -1):
        same = [axes[-back] for axes in all_axes if len(axes) >= back and axes[-back].size == shape[-back]]
        for other in same[1:]:
            unify(same[0], other)
        made.append(same[0] if same else Axis(shape[-back]))
    return tuple(made)


def _pointwise(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    given = [t.of(x) for x in _tensors([*args, *kwargs.values()])]
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
    """cumsum, flip, roll: the order along some dimensions counts, here of all that are named."""
    axes = t.of(args[0])
    dims = args[-1] if len(args) > 1 else range(len(axes))
    for dim in [dims] if isinstance(dims, int) else dims:
        pin(axes[dim])
    return [axes]


def _triangular(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    axes = t.of(args[0])
    t.hold(axes[-2:])
    return [axes]


def _pooled(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes]:
    """Pooling, resizing, padding: what changes size, and every dimension behind the channels, is pinned."""
    axes = t.of(args[0])
    t.hold(axes[2:])
    made = []
    for axis, size in zip(axes, outs[0].shape):
        if axis.size != size:
            pin(axis)
        made.append(axis if axis.size == size else Axis(size, True))
    return [tuple(made)] * len(outs)


def _indexed(t: Trace, args: Sequence[Any], kwargs: dict[str, Any], outs: list[Any]) -> Sequence[Axes] | None:
    axes, indices = t.of(args[0]), list(args[1])
    where = [i for i, index in enumerate(indices) if index is not None]
    if not where or where != list(range(where[0], where[-1] + 1)) or any(indices[i].dtype == torch.bool for i in where):
        return None
    for i in where:
        pin(axes[i])
        t.hold(t.of(indices[i]))
    new = outs[0].dim() - (len(axes) - len(where))
    return [(*axes[: where[0]], *fixed(outs[0].shape[where[0] : where[0] + new]), *axes[where[-1] + 1 :])]


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
        "_to_copy clone detach alias contiguous copy lift_fresh lift masked_fill dropout native_dropout", _pointwise
    ),
    **_ruled("gelu silu relu leaky_relu elu hardtanh hardswish softplus mish clamp where addcmul addcdiv", _pointwise),
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
    **_ruled("tril triu", _triangular),
    **_ruled("max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d max_pool2d", _pooled),
    **_ruled("upsample_bilinear2d upsample_nearest2d upsample_bicubic2d constant_pad_nd", _pooled),
    **_ruled("index", _indexed),
    **_ruled("index_select", _picked),
    **_ruled("index_add", _added_at),
}
