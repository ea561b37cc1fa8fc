"""One module run with weights that are computed: mixtures of several models' parameters, differentiably."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from lfm.core.errors import MismatchError
from lfm.core.heavy import nn, torch
from lfm.core.interfaces import Gradients
from lfm.core.model import Model
from lfm.models.device import forward

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and floating buffers by name, tied ones once: all that averaging applies to. Not copied."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if tensor.is_floating_point()}


def matched(module: nn.Module, like: Mapping[str, Tensor], ref: str) -> dict[str, Tensor]:
    """The module's parameters, by the names and in the order of `like`. MismatchError if names or shapes differ."""
    found = parameters_of(module)
    differ = sorted(found.keys() ^ like.keys())
    differ += [name for name in like if name in found and found[name].shape != like[name].shape]
    if differ:
        raise MismatchError(f"{ref} has other parameters than the first model", why=f"{', '.join(differ[:3])} differ")
    return {name: found[name] for name in like}


def stacked(models: Sequence[Model], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each parameter of all the models, (N, …). One module is open at a time beside the result."""
    out = {name: torch.empty(len(models), *value.shape) for name, value in like.items()}
    for place, model in enumerate(models):
        for name, value in matched(model.ask(Gradients).module(), like, model.ref).items():
            out[name][place] = value
    return out


def mixed(stack: Mapping[str, Tensor], weights: Callable[[int, str], Tensor]) -> dict[str, Tensor]:
    """Σᵢ wᵢ θᵢ for each parameter: weights(place, name) gives its (N,) weights."""
    return {
        name: torch.tensordot(weights(place, name), values, dims=1)
        for place, (name, values) in enumerate(stack.items())
    }


def forward_with(module: nn.Module, tensors: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """What `forward` gives where these tensors stand in place of the module's own; the gradient reaches them."""
    from torch.func import functional_call

    class Reached(nn.Module):  # made here, so that listing methods loads no torch
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, batch: Batch) -> Tensor:
            return forward(self.module, batch)

    given = {f"module.{name}": tensor for name, tensor in tensors.items()}
    return cast("Tensor", functional_call(Reached(), given, (dict(batch),)))


def load_into(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module with these values; the ones tied to them follow."""
    own = dict([*module.named_parameters(), *module.named_buffers()])
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
    return module
