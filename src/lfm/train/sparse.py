"""Training a few chosen numbers of a module, wherever they lie: the others stay as they are, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from lfm.core.heavy import nn, torch
from lfm.models.mixing import forward_with

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch

Places = Mapping[str, "Tensor"]
"""Parameter by name → which of its numbers, (k,) int64 places in its flat order, ascending."""


def top(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The places of the `count` highest scores over all tensors; of equal ones the earlier. Tensors with none are left
    out.

    No other choice of as many places has a larger sum.
    """
    names = list(scores)
    flat = torch.cat([scores[name].reshape(-1) for name in names])
    order = torch.argsort(flat, descending=True, stable=True)[:count]
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[order] = True
    parts = chosen.split([scores[name].numel() for name in names])
    return {name: part.nonzero()[:, 0] for name, part in zip(names, parts, strict=True) if bool(part.any())}


def gradient(
    module: nn.Module, batches: Iterable[Batch], loss: Callable[[nn.Module, Batch], Tensor], names: Iterable[str]
) -> dict[str, Tensor]:
    """The sum over batches of the loss's gradient at these parameters; zero where the loss does not reach them."""
    parameters = {name: module.get_parameter(name) for name in names}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for batch in batches:
        found = torch.autograd.grad(loss(module, batch), list(parameters.values()), allow_unused=True)
        for kept, g in zip(total.values(), found, strict=True):
            if g is not None:
                kept += g
    return {name: value.cpu() for name, value in total.items()}


def chosen(module: nn.Module, places: Places) -> nn.Module:
    """A module that answers as this one does, and whose only trained parameters are the numbers at these places.

    Its call takes a batch and gives logits (lfm.models.forward). Statistics that norms keep of batches stay as they
    are. `values_of` reads what the numbers have become.
    """

    class Chosen(nn.Module):  # made here, so that listing methods loads no torch
        def __init__(self) -> None:
            super().__init__()
            self.base = module.requires_grad_(False)
            self.values = nn.ParameterList(
                nn.Parameter(module.get_parameter(name).detach().reshape(-1)[where].clone())
                for name, where in places.items()
            )

        def train(self, mode: bool = True) -> Chosen:
            super().train(mode)
            for child in self.base.modules():
                if isinstance(child, nn.modules.batchnorm._BatchNorm):
                    child.eval()
            return self

        def whole(self) -> dict[str, Tensor]:
            """The changed parameters, entire."""
            made = {}
            for (name, where), values in zip(places.items(), self.values, strict=True):
                stored = self.base.get_parameter(name)
                flat = stored.reshape(-1).scatter(0, where.to(stored.device), values)
                made[name] = flat.reshape(stored.shape)
            return made

        def forward(self, batch: Batch) -> Tensor:
            return forward_with(self.base, self.whole(), batch)

    return Chosen()


def values_of(module: nn.Module, places: Places) -> dict[str, Tensor]:
    """The trained numbers of a module that `chosen` made, by parameter."""
    return {name: values.detach().cpu().clone() for name, values in zip(places, module.values, strict=True)}  # type: ignore[arg-type]


def put(module: nn.Module, places: Places, values: Mapping[str, Tensor]) -> nn.Module:
    """The module, changed in place, with these numbers at these places."""
    with torch.no_grad():
        for name, where in places.items():
            parameter = module.get_parameter(name)
            parameter.copy_(
                parameter.reshape(-1).scatter(0, where, values[name].to(parameter.dtype)).reshape_as(parameter)
            )
    return module
