"""The zoo's eight vision experts, their data, and what a model reaches over all eight tasks."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from lfm import models, zoo
from lfm.core import Inputs, Logits, Model
from lfm.core.config import configure
from lfm.core.method import check
from lfm.data.records import Image
from lfm.runs.run import LocalRun
from lfm.train.examine import examiner
from lfm.zoo import vision

TASKS = tuple(vision.TASKS)


def base() -> Model:
    return models.load(zoo.model("vit-base"))


def experts() -> list[Model]:
    return [models.load(zoo.model(f"vit-{task}")) for task in TASKS]


def images(part: str, count: int | None = None) -> list[Image]:
    """`count` records a task, each of its task's group. part: test, or train less what the base has seen."""
    first = vision.FEW if part == "train" else 0
    last = None if count is None else first + count
    every = [(task, record) for task in TASKS for record in vision.images(task, part)[first:last]]
    return [msgspec.structs.replace(record, group=task) for task, record in every]


def accuracy(model: Model, reader: Model | None = None) -> float:
    """Mean over the eight tasks' 360 test images each (all tasks have as many)."""
    return examiner(images("test"), reader or model)(model.ask(Logits).logits).accuracy


def fuse(
    method: ModuleType,
    /,
    work: Path,
    roles: Mapping[str, Sequence[Model]],
    data: Mapping[str, Sequence[Any]] | None = None,
    **settings: object,
) -> tuple[Any, LocalRun]:
    """What a run does around a method: check, agree, run. The result and the run's notes and curves."""
    config = configure(method.METHOD.config, settings)
    inputs = Inputs({role: tuple(given) for role, given in roles.items()}, data or {})
    inputs = check(method.__name__, method.METHOD, inputs)
    if method.METHOD.agree:
        method.METHOD.agree(config, inputs)
    run = LocalRun(0, Path(tempfile.mkdtemp(dir=work)))
    return method.METHOD.run(config, inputs, run), run
