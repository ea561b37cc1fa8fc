"""A registry of stand-in methods, so that what the command line shows does not change as methods are added."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Annotated, Any

from lfm.core import (
    Config,
    Cost,
    Data,
    DataSlot,
    Gradients,
    Inputs,
    Logits,
    Logprobs,
    Meta,
    Method,
    Run,
    Slot,
    Text,
    registry,
)
from lfm.core.interfaces import Codec, Weights


class Settings(Config):
    rank: Annotated[int, Meta(ge=1, description="rank of the update")] = 8
    rate: Annotated[float, Meta(gt=0, description="learning rate")] = 1e-3
    kind: Annotated[str, Meta(description="which form")] = "lora"


def _run(config: Settings, inputs: Inputs, run: Run) -> Any:
    raise AssertionError("the command line must not run this")


def _method(models: dict[str, Slot], data: dict[str, DataSlot] | None = None, gives: str = "model") -> Method[Settings]:
    return Method(
        paper="https://arxiv.org/abs/2106.09685",
        config=Settings,
        models=models,
        data=data or {},
        run=_run,
        cost=lambda config, sizes: Cost(flops=1e9 * config.rank, steps=10, memory=10**6, disk=10**5),
        gives=gives,
    )


TRAIN = DataSlot(Data.FEW_SHOT, kinds=("label", "completion"), help="what the model should learn")

METHODS: dict[str, tuple[str, Method[Settings]]] = {
    "tune.lora": (
        "Low-rank adaptation: train a product of two thin matrices beside each frozen one.\n\n    ΔW = (α/r)·B·A\n\n"
        "Hu et al. 2021.\n\n>>> 1 + 1\n2",
        _method({"model": Slot((Gradients, Codec), help="the model to tune")}, {"train": TRAIN}),
    ),
    "prompt.manual": (
        "Templates and label words, chosen on a few examples.",
        _method({"model": Slot((Logprobs,))}, {"train": TRAIN}),
    ),
    "augment.reason": ("Chain of thought and self-consistency.", _method({"model": Slot((Text,))})),
    "distill.response": (
        "A student learns the teacher's probabilities.",
        _method(
            {"teacher": Slot((Logits,)), "student": Slot((Gradients, Codec, Logits))},
            {"text": DataSlot(Data.UNLABELED, kinds=("text",))},
        ),
    ),
    "reuse.linear": (
        "The weighted mean of models' weights.",
        _method({"models": Slot((Weights,), min=2, max=None), "base": Slot((Weights,), min=0)}),
    ),
    "probe.lama": (
        "What facts does a model know?",
        _method({"model": Slot((Logprobs,))}, {"facts": DataSlot(Data.LABELED, kinds=("fact",))}, gives="finding"),
    ),
}


def plant(monkeypatch: Any) -> None:
    """Put the stand-ins in place of the methods."""
    names = {}
    for id, (doc, method) in METHODS.items():
        module = ModuleType(f"planted_{id.replace('.', '_')}", doc)
        module.METHOD = method  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        names[id] = module.__name__
    monkeypatch.setattr(registry, "ids", lambda: names)
