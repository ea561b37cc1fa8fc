"""Learning from answers beside something else: the labels' and the teacher's parts of a loss, weighed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from lfm.core import Logits, Meta, Model
from lfm.core.errors import AccessError
from lfm.core.heavy import F
from lfm.distilling.objective import mixed
from lfm.distilling.student import Taught
from lfm.distilling.telling import gap

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.model import Batch
    from lfm.distilling.lesson import Lesson


class Answering(Taught, frozen=True):
    """Settings of a training in which answers are learned too."""

    temperature: Annotated[float, Meta(gt=0, description="T, of both models' answers")] = 4.0
    alpha: Annotated[
        float, Meta(ge=0, le=1, description="weight of the teacher's answers against the labels'; 0: it is not asked")
    ] = 0.9


def learned(config: Answering, lesson: Lesson, logits: Tensor, batch: Batch) -> Tensor:
    """(1 − α) CE(y, p) + α T² KL(pᵗ_T ‖ p_T) (1503.02531) of the student's logits on a batch; a scalar."""
    scored, labels = lesson.task.scored(logits, batch)
    if config.alpha == 0:
        return F.cross_entropy(scored, labels)
    return mixed(scored, labels, gap(scored, batch, config.temperature), config.alpha)


def agree(config: Answering, teacher: Model) -> None:
    """That a teacher whose answers are learned gives them. AccessError."""
    if config.alpha and not teacher.can(Logits):
        raise AccessError(
            f"{teacher.ref} does not give logits",
            why=f"alpha={config.alpha} also learns from its answers",
            fix="alpha=0 learns from labels and from what is inside it",
        )
