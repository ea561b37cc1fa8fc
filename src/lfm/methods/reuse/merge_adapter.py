"""Merge a LoRA adapter into the weights it was made for, or into those of another model of that shape.

    W' = W + λ s BA        s = α/r, with rsLoRA α/√r; λ is `scale`

Paper: LoRA, arXiv 2106.09685, section 4.1; what peft calls merge_and_unload. Into another model (a later fine-tune of
the adapter's base, say) the same change is added: W of `model`, BA as it is. Biases and modules_to_save θ go along as
θ' = θ + λ (θ_adapter − θ_base). Differs from peft: no module is built and tensors are streamed, so that memory does not
grow with the model; sums are in fp64 and rounded once to the model's dtype; and where a model ties two layers of which
the adapter changes one, this is refused (peft 0.21.2 changes both without a word).

Models: a LoRA adapter; a checkpoint with its layers' names and shapes, without which its own base is taken. The result
is a checkpoint with that model's files. Errors: MismatchError naming the tensor that does not fit; AccessError for
adapters that are not W + BA; CorruptError naming a tensor that is not finite.

    lfm run reuse.merge_adapter adapter=adapter model=later --out merged
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import lfm.core
from lfm.core import Adaptation, Cost, Inputs, Meta, Method, Model, Run, Sizes, Slot, Weights
from lfm.core.errors import ConfigError
from lfm.models import combine, lora
from lfm.tensors.lazy import lazy

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


class Config(lfm.core.Config, frozen=True):
    scale: Annotated[float, Meta(description="λ, how much of the change to add; -1 takes it off")] = 1.0


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    return _into(inputs).ask(Weights).replace(_merged(config, inputs))


def _into(inputs: Inputs) -> Model:
    return inputs.model("model") if inputs.all("model") else inputs.model("adapter").ask(Adaptation).base


def _merged(config: Config, inputs: Inputs) -> dict[str, LazyTensor]:
    adapter, model = inputs.model("adapter"), _into(inputs)
    changes, whole = combine.added([adapter], [config.scale])
    if inputs.all("model"):
        base = adapter.ask(Adaptation).base
        whole = {name: combine.moved(name, tensor, base, model) for name, tensor in whole.items()}
    return lora.patched(model, changes, {name: lazy(tensor) for name, tensor in whole.items()}, adapter.ref)


def agree(config: Config, inputs: Inputs) -> None:
    if not config.scale:
        raise ConfigError("scale is 0", why="the result would be the model as it is")
    _merged(config, inputs)


def cost(config: Config, sizes: Sizes) -> Cost:
    facts = (*sizes.models.get("model", ()), *sizes.models["adapter"])[0]
    return Cost(flops=64.0 * facts.parameters, memory=1 << 28, disk=facts.bytes)


METHOD = Method(
    paper="arXiv:2106.09685",
    config=Config,
    models={
        "adapter": Slot((Adaptation,), help="the LoRA adapter"),
        "model": Slot((Weights,), min=0, help="what to merge it into; its own base without one"),
    },
    run=run,
    cost=cost,
    agree=agree,
)
