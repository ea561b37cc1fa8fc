"""A loss as a module, for what wraps or calls modules: processes that exchange gradients, functional calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lfm.core.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch


def called(module: nn.Module, loss: Callable[[nn.Module, Batch], Tensor]) -> nn.Module:
    """A module whose forward is the loss of a batch; the loss may call the module often, or parts of it."""

    class Called(torch.nn.Module):  # made here, so that listing methods loads no torch
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, batch: Batch) -> Tensor:
            return loss(self.module, batch)

    return Called()
