"""Students: the module given, or what matters most of it, with its weights or with new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from lfm.core import Gradients, Meta, Model, Run
from lfm.core.errors import ConfigError
from lfm.core.model import Facts
from lfm.distilling import narrower
from lfm.models import layers
from lfm.train import Fit, seeded

if TYPE_CHECKING:
    from lfm.core.heavy import nn
    from lfm.core.interfaces import Batch
    from lfm.distilling.lesson import Lesson

SHOWN = 64
"""Records by which a student's parts are judged."""


class Taught(Fit, frozen=True):
    """Settings of a training whose student may be made smaller first."""

    layers: Annotated[int, Meta(ge=0, description="blocks of the student to keep; 0: all")] = 0
    drop: Annotated[
        Literal["even", "influence"],
        Meta(description="which blocks are kept: evenly spaced, or those that change most what they read"),
    ] = "even"
    neurons: Annotated[float, Meta(gt=0, le=1, description="share of each feed-forward layer's neurons to keep")] = 1.0
    heads: Annotated[float, Meta(gt=0, le=1, description="share of each block's attention heads to keep")] = 1.0
    channels: Annotated[float, Meta(gt=0, le=1, description="share of the width between the blocks to keep")] = 1.0
    importance: Annotated[
        narrower.Importance,
        Meta(description="what neurons, heads and channels are kept by, of their own or their weights"),
    ] = "activation"
    start: Annotated[
        Literal["weights", "random"], Meta(description="whether the student begins with its weights or new ones")
    ] = "weights"


def formed(module: nn.Module, config: Taught, run: Run, *key: object, lesson: Lesson | None = None) -> nn.Module:
    """The student that these settings make of a module, changed in place or new. ConfigError, ModelError.

    key: of new weights, where one run makes several students. lesson: what it is shown, where blocks are kept by
    influence or it is made narrower.
    """
    shares = _shares(config)
    if config.layers and config.drop == "influence":
        module = narrower.without_idle_blocks(module, config.layers, _shown(lesson))
    elif config.layers:
        module = layers.shallower(module, config.layers)
    if shares != narrower.Shares():
        module = narrower.narrower(module, shares, config.importance, _shown(lesson))
    if config.start == "weights":
        return module
    settings: Any = getattr(module, "config", None)
    if settings is None:
        raise ConfigError("start=random needs an architecture of transformers", why="this module names no config")
    with seeded(run.seed_for("student", *key)):
        return type(module)(settings).requires_grad_(True)


def tried(config: Taught, student: Model, run: Run, lesson: Lesson) -> None:
    """That the student can be made narrower, before a teacher is paid for what is cut by. ConfigError, ModelError.

    lesson: anything that the student can be shown.
    """
    if _shares(config) != narrower.Shares():
        formed(student.ask(Gradients).module(), config, run, lesson=lesson)


def agree(config: Taught, student: Model) -> None:
    """That a causal student has as many blocks as are to be kept, before anybody is asked for anything. ConfigError."""
    many = student.facts.layers
    if student.facts.task == "causal-lm" and 0 < many < config.layers:
        raise ConfigError(f"{config.layers} blocks cannot be kept of {many}", fix=f"layers={many} at most; 0 keeps all")


def _shares(config: Taught) -> narrower.Shares:
    return narrower.Shares(config.neurons, config.heads, config.channels)


def _shown(lesson: Lesson | None) -> list[Batch]:
    if lesson is None:
        raise ConfigError(
            "this method cannot say which parts of the student matter",
            why="it has no records to show it beforehand",
            fix="layers with drop=even, or make the student smaller with distill.response first",
        )
    numbers = lesson.numbers[:SHOWN]
    return [lesson.collate(numbers[i : i + 16]) for i in range(0, len(numbers), 16)]


def smaller(config: Taught, facts: Facts) -> Facts:
    """What is known of that student before it is made, for a plan: two thirds of a block are its neurons."""
    part = config.layers / facts.layers if config.layers and facts.layers else 1.0
    wide = config.channels * (2 * config.neurons + config.heads) / 3
    tokens = min(facts.vocabulary * facts.width, facts.parameters)
    return facts._replace(
        parameters=int(tokens * config.channels + (facts.parameters - tokens) * part * wide),
        layers=int(facts.layers * part),
        width=int(facts.width * config.channels),
    )
