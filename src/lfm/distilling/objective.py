"""What a student is trained by: the labels, and what a teacher told of the same places."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lfm.core.heavy import F
from lfm.distilling.telling import gap
from lfm.models import forward

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.model import Batch
    from lfm.data.task import Task


def heeding(task: Task, alpha: float, temperature: float) -> Callable[[nn.Module, Batch], Tensor]:
    """(module, batch) → (1 − α) CE(y, p) + α T² KL(pᵗ_T ‖ p_T), a mean over the scored places.

    The batch holds what was told (lfm.distilling.telling). With α = 1 labels are left unread.
    """

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        logits, labels = task.scored(forward(module, batch), batch)
        return mixed(logits, labels, gap(logits, batch, temperature), alpha)

    return loss


def mixed(logits: Tensor, labels: Tensor, heard: Tensor, alpha: float) -> Tensor:
    """(1 − α) CE(y, p) + α `heard`; with α = 1 labels are left unread."""
    return heard if alpha == 1 else (1 - alpha) * F.cross_entropy(logits, labels) + alpha * heard
