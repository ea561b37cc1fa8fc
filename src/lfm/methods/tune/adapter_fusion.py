"""Mix several trained adapters by attention, learnt on one task's data.

    y = h + Σᵢ softmaxᵢ((Q h) · (K aᵢ)) V aᵢ,   aᵢ: what the i-th adapter adds to h

Paper: Pfeiffer et al., AdapterFusion, arXiv 2005.00247: adapters of N tasks stay as they are; in every layer Q, K, V
learn which of them to take for each token; V begins at the identity, kept near it by a penalty. 3d² + 2d numbers a
layer. Differs from the paper: V begins at the identity exactly, and the penalty λ‖V − 1‖² has its own setting; the
heads of the tasks are left behind, and the base's own trains.

Models: a base with Gradients and a codec; adapters of type HOULSBY over that very base (by digest), of one form, with
the same parts and without trained norms (tune.houlsby, train_norms=false, or tune.adamix): a norm belongs to one
adapter and cannot be mixed. Data: every record kind, as its task. The result is a PEFT directory of type
ADAPTER_FUSION over the base, which holds the adapters too; it cannot be merged. Errors: MismatchError where the
adapters do not fit each other or the base; DivergedError.

    lfm run tune.adapter_fusion model=base adapters=one adapters=two train=facts.jsonl --out fused
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from lfm import tuners
from lfm.core import Cost, Inputs, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import MismatchError
from lfm.models import forward
from lfm.models.adapter import Stored, over
from lfm.train import RECORDS, suited
from lfm.tuners.tuning import MODEL, Tuning, cost_of, trained

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from lfm.core.interfaces import Batch
    from lfm.data.task import Task

SAME = ("target_modules", "form", "activation", "scale")
"""Settings that adapters must share to be mixed."""
HERE, FROM = "adapter_fusion_adapter", "houlsby_adapter"


class Config(Tuning, frozen=True):
    penalty: Annotated[float, Meta(ge=0, description="λ, on how far V is from the identity")] = 0.01


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    stored: list[Any] = [adapter.ask(Stored) for adapter in inputs.models["adapters"]]
    first = fitting(stored, [adapter.ref for adapter in inputs.models["adapters"]], model)
    settings = tuners.AdapterFusionConfig(
        widths=tuple(adapter.config["width"] for adapter in stored),
        **{name: first[name] for name in ("parts", *SAME)},
    )

    def place(module: nn.Module) -> None:
        parameters = dict(module.named_parameters())
        for number, adapter in enumerate(stored):
            for name, tensor in adapter.tensors().items():
                if f".{FROM}." in name:
                    key = name.replace(f".{FROM}.", f".{HERE}.default.frozen.{number}.")
                    parameters[key].data.copy_(tensor if not hasattr(tensor, "read") else tensor.read())

    def loss(module: nn.Module, batch: Batch, task: Task) -> Tensor:
        own = task.loss(forward(module, batch), batch)
        values = [p for name, p in module.named_parameters() if name.endswith(f".{HERE}.default.value")]
        return own + config.penalty * sum((v - v.new_ones(len(v)).diag()).square().sum() for v in values)

    return over(model, trained(config, inputs, run, settings, loss, place))


def agree(config: Config, inputs: Inputs) -> None:
    suited(config, Inputs({"model": inputs.all("model")}, inputs.data))
    adapters = inputs.all("adapters")
    fitting([adapter.ask(Stored) for adapter in adapters], [a.ref for a in adapters], inputs.model("model"))


def fitting(stored: Sequence[Stored], refs: Sequence[str], model: Model) -> dict[str, Any]:
    """The settings that the adapters share. MismatchError where they cannot be mixed over this model."""
    first = dict(stored[0].config)
    for adapter, ref in zip(stored, refs):
        if adapter.config.get("peft_type") != "HOULSBY":
            raise MismatchError(
                f"{ref} is a {adapter.config.get('peft_type')} adapter",
                why="what is mixed by attention is what bottleneck adapters (HOULSBY) add at their places",
                fix="adapters that tune.houlsby made with train_norms=false; reuse.adapters adds LoRAs up",
            )
        if adapter.base.digest != model.digest:
            raise MismatchError(
                f"{ref} is an adapter over another model",
                why=f"its base {adapter.base.ref} has digest {adapter.base.digest[:12]}, not {model.digest[:12]}",
                fix=f"model={adapter.base.ref}, or adapters over {model.ref}",
            )
        if adapter.config.get("train_norms"):
            raise MismatchError(
                f"{ref} has norms of its own", why="norms cannot be mixed", fix="train it with train_norms=false"
            )
        different = [name for name in SAME if _of(adapter.config, name) != _of(first, name)]
        if different:
            raise MismatchError(
                f"{ref} and {refs[0]} differ in {', '.join(different)}",
                why="; ".join(f"{name}: {adapter.config[name]} and {first[name]}" for name in different[:2]),
                fix="fuse adapters that were trained with the same settings; only their width may differ",
            )
    return first


def _of(config: Any, name: str) -> Any:
    return sorted(config[name]) if isinstance(config[name], list) else config[name]


def cost(config: Config, sizes: Sizes) -> Cost:
    facts = sizes.model("model")
    return cost_of(config, sizes, 2 * (3 * facts.width + 2) * facts.width * facts.layers)


METHOD = Method(
    paper="arXiv:2005.00247",
    config=Config,
    models=MODEL | {"adapters": Slot((Stored,), 1, None, help="trained bottleneck adapters over the model")},
    data=RECORDS,
    forms=("adapter",),
    agree=agree,
    run=run,
    cost=cost,
)
