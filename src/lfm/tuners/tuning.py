"""Training one of the tuners on a model's task: what their methods share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from lfm.core import Codec, Cost, Gradients, Inputs, Meta, Model, Run, Sizes, Slot
from lfm.core.errors import MismatchError
from lfm.core.heavy import peft
from lfm.models import adapter
from lfm.models import layers as found
from lfm.models.quiet import quiet
from lfm.train import Fit, seeded, taught, training
from lfm.train.taught import plain

if TYPE_CHECKING:
    from peft.config import PeftConfig
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch
    from lfm.data.task import Task

MODEL = {"model": Slot((Gradients, Codec), help="the model to adapt")}


class Tuning(Fit, frozen=True):
    """What every tuner's method is set by, beside its own settings."""

    train_head: Annotated[bool, Meta(description="train a classifier's head as well")] = True
    lr: Annotated[float, Meta(gt=0, description="peak learning rate (AdamW)")] = 1e-3
    weight_decay: Annotated[float, Meta(ge=0, description="decoupled weight decay, of matrices only")] = 0.0


def trained(
    config: Tuning,
    inputs: Inputs,
    run: Run,
    settings: PeftConfig,
    loss: Callable[[nn.Module, Batch, Task], Tensor] = plain,
    prepare: Callable[[nn.Module], None] = lambda module: None,
) -> nn.Module:
    """The peft module of these settings over the model, trained on the records. MismatchError where it does not fit.

    loss: (module, batch, task) → mean over the batch; by default the task's own. prepare: done to it before it trains.
    """
    model = inputs.model("model")
    with seeded(run.seed_for("adapter")):
        module = adapted(model.ask(Gradients).module(), settings, head=config.train_head and bool(model.facts.labels))
    prepare(module)
    taught(module, model, inputs.records("train"), config, run, dev=inputs.records("dev"), objective=loss)
    return module


def tuned(config: Tuning, inputs: Inputs, run: Run, settings: PeftConfig) -> Model:
    """`trained`, as an adapter over the model."""
    return adapter.over(inputs.model("model"), trained(config, inputs, run, settings))


def adapted(module: nn.Module, settings: Any, *, head: bool = False) -> nn.Module:
    """The module with the tuner in it. head: what stands beside the body trains too, and is saved with the adapter."""
    if head:
        settings.modules_to_save = [*(settings.modules_to_save or ()), *found.heads(module)]
    try:
        with quiet():
            return peft.get_peft_model(module, settings)  # type: ignore[arg-type,return-value]
    except (ValueError, NotImplementedError, TypeError) as error:
        raise MismatchError(
            f"{settings.peft_type.value.lower()} cannot adapt this model",
            why=str(error).splitlines()[0],
            fix="tune.lora adapts any model with linear layers",
        ) from None


def cost_of(config: Tuning, sizes: Sizes, trained: float) -> Cost:
    """What `trained` takes, of so many parameters that train."""
    facts = sizes.model("model")
    return training(config, facts, sizes.data["train"], share=min(1.0, trained / max(facts.parameters, 1)))
