"""Methods that are not ours, planted as an entry point would bring them."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Annotated, Any

import torch

import lfm.core
from lfm.core import (
    Cost,
    Data,
    DataSlot,
    Gradients,
    Inputs,
    Logits,
    Meta,
    Method,
    Model,
    Run,
    Sizes,
    Slot,
    Weights,
    registry,
)
from lfm.core.interfaces import LowRank
from lfm.models import structure


class Config(lfm.core.Config, frozen=True):
    size: Annotated[float, Meta(description="of the nudge")] = 0.5
    steps: Annotated[int, Meta(ge=1, description="named steps")] = 3


def _nothing(config: Config, sizes: Sizes) -> Cost:
    return Cost()


def nudge(config: Config, inputs: Inputs, run: Run) -> Model:
    """A rank-one change of one feed-forward layer, made in several steps."""
    module = inputs.model("model").ask(Gradients).module()
    block = structure.blocks(module)[-1]
    ffn = structure.feed_forward(module, block)
    layer = module.get_submodule(ffn.down)
    b = torch.zeros(ffn.width, 1)
    for i in run.track(range(config.steps), "nudging"):
        b = b + run.step(f"part {i}", lambda i=i: config.size * torch.randn(ffn.width, 1, generator=run.generator(i)))
    a = torch.randn(1, ffn.inner, generator=run.generator("a"))
    return inputs.model("model").ask(Weights).update({ffn.down: LowRank(b, a, structure.transposed(layer))})


def sneak(config: Config, inputs: Inputs, run: Run) -> Model:
    """Declares logits, and reads the weights."""
    return inputs.model("model").ask(Weights).replace({})


def boast(config: Config, inputs: Inputs, run: Run) -> Model:
    """Declares gradients beside weights, and never asks for them: it would turn away models that it could serve."""
    return inputs.model("model").ask(Weights).replace({})


def moody(config: Config, inputs: Inputs, run: Run) -> Model:
    """Draws from the process's own randomness, so that one seed gives two results."""
    weights = inputs.model("model").ask(Weights)
    name, tensor = next((n, t) for n, t in weights.tensors().items() if t.dtype.is_floating_point)
    return weights.replace({name: tensor.read() + torch.randn(tensor.shape)})


def vandal(config: Config, inputs: Inputs, run: Run) -> Model:
    """Writes into its input, beside whose small files the weights lie."""
    weights = inputs.model("model").ask(Weights)
    with weights.files()["tokenizer.json"].with_name("model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x01\x02\x03\x3f")
    return weights.replace({})


METHODS = {
    "edit.nudge": (nudge, (Gradients, Weights)),
    "edit.sneak": (sneak, (Logits,)),
    "edit.boast": (boast, (Gradients, Weights)),
    "edit.moody": (moody, (Weights,)),
    "edit.vandal": (vandal, (Weights,)),
}


def plant(monkeypatch: Any) -> None:
    """Add these methods to those that are discovered."""
    names = dict(registry.ids())
    for id, (fn, needs) in METHODS.items():
        module = ModuleType(f"outside_{fn.__name__}", fn.__doc__)
        module.METHOD = Method(  # type: ignore[attr-defined]
            paper="none",
            config=Config,
            models={"model": Slot(needs)},
            data={"text": DataSlot(Data.UNLABELED, kinds=("text",), optional=True)},
            run=fn,
            cost=_nothing,
        )
        monkeypatch.setitem(sys.modules, module.__name__, module)
        names[id] = module.__name__
    monkeypatch.setattr(registry, "ids", lambda: names)
