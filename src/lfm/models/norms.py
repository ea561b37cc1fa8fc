"""The statistics that batch norms run on, measured anew for weights that were computed, not trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lfm.core.heavy import nn, torch
from lfm.models.device import forward

if TYPE_CHECKING:
    from lfm.core.interfaces import Batch


def measured_anew(module: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """The module, in place, with each batch norm's mean and variance those of its inputs: the mean over the batches.

    A module without batch norms stays as it is. Each norm is measured behind those before it as they run in training.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    norms = [child for child in module.modules() if isinstance(child, kinds) and child.running_mean is not None]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    before = [(momentum, None if tracked is None else tracked.clone()) for momentum, tracked in before]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over batches
            norm.train()
        with torch.no_grad():
            for batch in batches if norms else ():
                forward(module, batch)
    finally:
        for norm, (momentum, tracked) in zip(norms, before):
            norm.eval()
            norm.momentum, norm.num_batches_tracked = momentum, tracked
    return module
