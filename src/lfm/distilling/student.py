"""Students: the module given, or fewer of its blocks, with its weights or with new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from lfm.core import Meta, Run
from lfm.core.errors import ConfigError
from lfm.core.model import Facts
from lfm.models import layers
from lfm.train import Fit, seeded

if TYPE_CHECKING:
    from lfm.core.heavy import nn


class Taught(Fit, frozen=True):
    """Settings of a training whose student may be made smaller first."""

    layers: Annotated[int, Meta(ge=0, description="blocks of the student to keep, evenly spaced; 0: all")] = 0
    start: Annotated[
        Literal["weights", "random"], Meta(description="whether the student begins with its weights or new ones")
    ] = "weights"


def formed(module: nn.Module, config: Taught, run: Run, *key: object) -> nn.Module:
    """The student that these settings make of a module, changed in place or new. ConfigError, ModelError.

    key: of new weights, where one run makes several students.
    """
    if config.layers:
        module = layers.shallower(module, config.layers)
    if config.start == "weights":
        return module
    settings: Any = getattr(module, "config", None)
    if settings is None:
        raise ConfigError("start=random needs an architecture of transformers", why="this module names no config")
    with seeded(run.seed_for("student", *key)):
        return type(module)(settings).requires_grad_(True)


def smaller(config: Taught, facts: Facts) -> Facts:
    """What is known of that student before it is made, for a plan."""
    part = config.layers / facts.layers if config.layers and facts.layers else 1.0
    return facts._replace(parameters=int(facts.parameters * part), layers=int(facts.layers * part))
