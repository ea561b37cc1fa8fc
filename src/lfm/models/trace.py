"""One forward pass, followed operation by operation: which axes of which weights must be permuted together.

Each rule says how an ATen operation passes axes on. An operation without a rule pins every axis it touches, and so does
whatever enters from outside (inputs, constants) and what comes out (logits): an unknown model is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from lfm.core.heavy import torch
from lfm.models.axes import Axis, UnclearError, fixed, free, leaves, pin, unify
from lfm.models.device import forward
from lfm.models.flow import RULES, VIEWS, Axes, pointwise, tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch


@final
@dataclass
class Trace:
    """What a pass showed. weights: axes of each parameter and floating buffer, by name.

    seen: the axes of every tensor; mixed: (axes an operation mixes, all axes of its tensor): softmax, norms;
    tied: axes along which two activations are multiplied; reads: (activation, its axes, the axis that is contracted
    with a weight) in the order of the pass; contracted: the weights' axes that are read so; unknown: operations without
    a rule that pinned a weight's axis.
    """

    weights: dict[str, Axes]
    seen: list[Axes] = field(default_factory=list)
    mixed: list[tuple[Axes, Axes]] = field(default_factory=list)
    tied: list[Axis] = field(default_factory=list)
    reads: list[tuple[Tensor, Axes, Axis]] = field(default_factory=list)
    contracted: list[Axis] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    _stopped: dict[str, list[Axis]] = field(default_factory=dict)
    _owed: dict[int, list[Axis]] = field(default_factory=dict)  # what is pinned once a tensor is used
    _axes: dict[int, Axes] = field(default_factory=dict)
    _kept: list[Tensor] = field(default_factory=list)  # an id is a tensor's own only while the tensor lives
    _storages: dict[int, list[str]] = field(default_factory=dict)
    _stored: set[int] = field(default_factory=set)  # ids of weights and of their views
    _reached: set[str] = field(default_factory=set)

    def put(self, tensor: Tensor, axes: Iterable[Axis]) -> None:
        axes = tuple(axes)
        if id(tensor) in self._axes:  # written in place
            self.of(tensor)
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
        self.hold(self._owed.pop(id(tensor), ()))
        return self._axes[id(tensor)]

    def owe(self, tensor: Tensor, axis: Axis) -> None:
        """The axis is pinned if the tensor is ever used: some are made only to look at their shape."""
        self._kept.append(tensor)
        self._owed.setdefault(id(tensor), []).append(axis)

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
                for tensor in tensors(args[:1]):
                    followed.hold(followed.of(tensor))
            return func(*args, **(kwargs or {}))

    was = module.training
    module.eval()
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Following(), Leaving():
            logits = forward(module, batch)
    finally:
        module.train(was)
    own = {leaf for axes in followed.weights.values() for axis in axes for leaf in leaves(axis)}
    for name, axes in followed._stopped.items():
        if any(leaf in own for axis in axes for leaf in leaves(axis)):
            followed.unknown.add(name)
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
        rule = pointwise
    try:
        made = rule(t, args, kwargs, outs) if rule else None
    except UnclearError:
        made = None
    if made is None or any([a.size for a in axes] != list(o.shape) for axes, o in zip(made, outs)):
        made = [fixed(o.shape) for o in outs]
        for tensor in tensors([*args, *kwargs.values()]):
            t._stopped.setdefault(name, []).extend(a for a in t.of(tensor) if not all(l.pinned for l in leaves(a)))
            t.hold(t.of(tensor))
    for tensor, axes in zip(outs, made):
        t.put(tensor, axes)
    sources = [x for x in args if isinstance(x, torch.Tensor)]
    if known in VIEWS and sources and id(sources[0]) in t._stored:
        t._stored |= {id(o) for o in outs}
