"""A LoRA's train step with less kept for its backward pass: each input once, no dropout masks, no narrow weights.

The peft module stays what it is, and what is saved; while the context lasts its layers compute the same numbers another
way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

from lfm.core.heavy import nn, torch
from lfm.models import structure
from lfm.models.activations import is_gelu_in_steps

if TYPE_CHECKING:
    from torch import Tensor


LEAST = 2**24
"""Multiplications of a LoRA's layer below which our calls cost more time than what they save."""
MANY = 2**25
"""Those of a frozen layer from which on oneDNN's product gains more than our call costs, where nothing is kept less."""


@contextmanager
def lean(module: nn.Module) -> Iterator[int]:
    """Inside, the module's LoRA layers, its frozen linear ones and its activation functions keep less. How many do.

    A layer keeps its input in the arithmetic's dtype, shared with the other layers that read it, and A x of r numbers
    a token; peft keeps an input a layer (under autocast a copy each, and one of the frozen weights) and each mask. An
    activation function of several steps keeps what it read: GPT-2's GELU is taken in one step, the same to rounding,
    and of others the steps are taken again, the same bits. Left alone: products too small to pay for it, and what peft
    does beyond y = W x + b + s B A drop(x) (DoRA and other variants, several adapters at once, merged layers,
    convolutions, trained or sharded weights). A dropout's masks are drawn from a seed that torch's generator gives, so
    that one seed gives one result; they are other masks than peft's.
    """
    from lfm.train.lean.modules import Narrow

    narrow = Narrow()
    inside = {id(layer.base_layer) for layer in module.modules() if _is_lora(layer)}
    stepwise = {id(layer) for layer in structure.activations(module) if _has_steps(layer)}
    changed: list[nn.Module] = []
    try:
        for layer in [*module.modules()]:
            if _is_lora(layer):
                layer.forward = MethodType(_adapted(narrow, type(layer).forward, _outs(layer)), layer)
            elif id(layer) not in inside and _is_plain(layer):
                layer.forward = MethodType(_frozen(narrow, type(layer).forward, _outs(layer)), layer)
            elif id(layer) in stepwise:
                layer.forward = MethodType(_gelu if is_gelu_in_steps(layer) else _again(type(layer).forward), layer)
            else:
                continue
            changed.append(layer)
        yield len(changed)
    finally:
        for layer in changed:
            del layer.forward


def _is_lora(layer: nn.Module) -> bool:
    from peft.tuners.lora import layer as lora

    return type(layer) is lora.Linear and _is_plain(layer.get_base_layer())


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear or type(layer).__name__ == "Conv1D"


def _outs(layer: nn.Module) -> int:
    plain: Any = getattr(layer, "base_layer", layer)
    return int(plain.weight.shape[1 if structure.transposed(plain) else 0])


def _has_steps(layer: nn.Module) -> bool:
    """Whether autograd sees more than one operation in it."""
    with torch.enable_grad(), torch.random.fork_rng():
        y = layer(torch.ones(1, requires_grad=True))
    return y.grad_fn is not None and any(above.next_functions for above, _ in y.grad_fn.next_functions if above)


def _still(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors (no shards of others) that do not train."""
    return all(t is None or (not t.requires_grad and type(t) in (nn.Parameter, torch.Tensor)) for t in tensors)


def _dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """Of the arithmetic, as torch would choose it. None where torch would refuse."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype if x.dtype == weight.dtype else None


def _explicit(kind: str) -> AbstractContextManager[object]:
    """Without autocast, which costs time to leave where it is not on."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _frozen(narrow: Any, plain: Any, outs: int) -> Any:
    from lfm.train.lean.modules import Frozen

    def forward(self: Any, x: Tensor) -> Tensor:
        dtype = _dtype(x, self.weight)
        if dtype is None or not _still(self.weight, self.bias) or not (torch.is_grad_enabled() and x.requires_grad):
            return plain(self, x)
        if dtype == self.weight.dtype and x.numel() * outs < MANY:
            return plain(self, x)
        with _explicit(x.device.type):
            return Frozen.apply(x, narrow(x, dtype), self.weight, self.bias, structure.transposed(self))  # type: ignore[return-value]

    return forward


def _gelu(self: Any, x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh")


def _again(plain: Any) -> Any:
    from lfm.train.lean.modules import Again

    def forward(self: Any, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return plain(self, x)
        return Again.apply(x, partial(plain, self))  # type: ignore[return-value]

    return forward


def _adapted(narrow: Any, plain: Any, outs: int) -> Any:
    from lfm.train.lean.modules import Adapted

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.numel() * outs < LEAST:
            return plain(self, x, *args, **kwargs)
        base = self.get_base_layer()
        dtype = _dtype(x, base.weight)
        active = [name for name in self.active_adapters if name in self.lora_A]
        usual = not (args or kwargs or self.disable_adapters or self.merged) and len(active) == 1
        if not usual or dtype is None or not torch.is_grad_enabled() or not _still(base.weight, base.bias):
            return plain(self, x, *args, **kwargs)
        (name,) = active
        a, b = self.lora_A[name], self.lora_B[name]
        if name in self.lora_variant or b.bias is not None or not _matching(dtype, x, a.weight, b.weight):
            return plain(self, x)
        drop = self.lora_dropout[name]
        share = float(drop.p) if isinstance(drop, nn.Dropout) and drop.training else 0.0
        seed = int(torch.randint(2**62, ())) if share else 0
        with _explicit(x.device.type):
            return Adapted.apply(  # type: ignore[return-value]
                x,
                narrow(x, dtype),
                base.weight,
                base.bias,
                a.weight,
                b.weight,
                float(self.scaling[name]),
                share,
                seed,
                structure.transposed(base),
            )

    return forward


def _matching(dtype: torch.dtype, x: Tensor, *factors: Tensor) -> bool:
    """Whether the factors are of the arithmetic's dtype, or autocast brings them there."""
    plain = all(type(factor) in (nn.Parameter, torch.Tensor) for factor in factors)
    return plain and (torch.is_autocast_enabled(x.device.type) or all(factor.dtype == dtype for factor in factors))


__all__ = ["lean"]
