"""Merging small models made by hand."""

from __future__ import annotations

import json
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
from methods.reuse.reference import CASES, checkpoint

RECORDED = json.loads(Path(__file__).with_name("mergekit.json").read_text())


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


def recorded(method: str) -> list[str]:
    """The cases of a method whose values mergekit 0.1.5 gave, in fp32 (reference.py)."""
    return [name for name, case in CASES.items() if "told" in case and case["method"] == method]


def agrees_with_mergekit(method: ModuleType, name: str, work: Path, rtol: float = 4.8e-7, atol: float = 2.4e-7) -> None:
    """Within a rounding of fp32 or two: mergekit's own sums are in fp32."""
    case = CASES[name]
    given = {i: models.load(checkpoint(work / str(i), i)) for i in range(3)}
    roles = {"models": [given[i] for i in case["models"]]}
    if case["base"] is not None and "base" in method.METHOD.models:
        roles["base"] = [given[case["base"]]]
    merged = tensors(merge(method, work, roles, **case["settings"]))
    for tensor, known in RECORDED[name].items():
        torch.testing.assert_close(merged[tensor].reshape(-1), torch.tensor(known), rtol=rtol, atol=atol)


def tuned(work: Path, count: int, shape: tuple[int, ...] = (300, 1001), apart: float = 0.1) -> list[Model]:
    """A base and models near it, of a tensor of more than one chunk and a vector."""
    random = torch.Generator().manual_seed(0)
    start = {"w": torch.randn(shape, generator=random), "v": torch.randn(5, generator=random)}
    made = [bare(work / "tuned-0.safetensors", start)]
    for i in range(1, count + 1):
        moved = {name: t + apart * torch.randn(t.shape, generator=random) for name, t in start.items()}
        made.append(bare(work / f"tuned-{i}.safetensors", moved))
    return made


def tensors(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in model.ask(Weights).tensors().items()}
