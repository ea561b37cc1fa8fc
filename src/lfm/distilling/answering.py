"""Learning from answers beside something else: the labels' and the teacher's parts of a loss, weighed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Protocol

from lfm.core import Logits, Meta, Model, Run
from lfm.core.errors import AccessError
from lfm.distilling.lesson import behind
from lfm.distilling.student import Taught
from lfm.distilling.telling import taught
from lfm.train.losses import Divergence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from lfm.core.interfaces import Batch
    from lfm.distilling.lesson import Lesson


class Answering(Taught, frozen=True):
    """Settings of a training in which answers are learned too."""

    temperature: Annotated[float, Meta(ge=0, description="T, of both models' answers; 0: 1 of words, 4 of classes")] = (
        0.0
    )
    alpha: Annotated[
        float, Meta(ge=0, le=1, description="weight of the teacher's answers against the labels'; 0: it is not asked")
    ] = 0.9


def softness(temperature: float, lesson: Lesson) -> float:
    """T: as it is set, or, where that is 0, 4 of classes and 1 of a vocabulary's words, of which few are likely."""
    return temperature or (4.0 if lesson.order else 1.0)


class Weighed(Protocol):
    """Settings that say α and T, whatever their defaults."""

    @property
    def alpha(self) -> float: ...

    @property
    def temperature(self) -> float: ...


def answered(
    config: Weighed,
    lesson: Lesson,
    teacher: Model,
    module: nn.Module,
    run: Run,
    kind: Divergence = "forward",
    name: str = "teacher",
) -> tuple[Callable[[nn.Module, Batch], Tensor], Callable[[Sequence[int]], Batch]]:
    """(1 − α) CE(y, p) + α T² D(pᵗ_T ‖ p_T) (1503.02531) of the module on a batch; and what collates such batches.

    name: of what is kept of the teacher, in the run. With α = 0 it is not asked.
    """
    collate = behind(lesson, teacher, run, name) if config.alpha else lesson.collate
    return taught(lesson, module, config.alpha, softness(config.temperature, lesson), kind), collate


def agree(config: Answering, teacher: Model) -> None:
    """That a teacher whose answers are learned gives them. AccessError."""
    if config.alpha and not teacher.can(Logits):
        raise AccessError(
            f"{teacher.ref} does not give logits",
            why=f"alpha={config.alpha} also learns from its answers",
            fix="alpha=0 learns from labels and from what is inside it",
        )
