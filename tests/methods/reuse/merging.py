"""Merging small models made by hand."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file

from lfm import models
from lfm.core import Inputs, Model, Weights
from lfm.core.config import configure
from lfm.core.method import check
from lfm.runs.run import LocalRun


def bare(path: Path, tensors: Mapping[str, torch.Tensor]) -> Model:
    """A state dict on disk, as a model that gives its weights."""
    save_file({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, path)
    return models.load(path)


def merge(method: ModuleType, work: Path, roles: Mapping[str, Sequence[Model]], **settings: object) -> Model:
    """What a run does around a method: check, agree, run."""
    config = configure(method.METHOD.config, settings)
    inputs = check("reuse", method.METHOD, Inputs({role: tuple(given) for role, given in roles.items()}))
    method.METHOD.agree(config, inputs)
    return method.METHOD.run(config, inputs, LocalRun(0, Path(tempfile.mkdtemp(dir=work))))


def tensors(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in model.ask(Weights).tensors().items()}
