"""A module taught records as their task: for methods that say which weights train, how fast, what is averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any, cast

from lfm.core.errors import DivergedError
from lfm.core.heavy import torch
from lfm.core.interfaces import Codec
from lfm.core.method import Data, DataSlot
from lfm.core.model import Model
from lfm.data import packing
from lfm.data import task as tasks
from lfm.models import forward
from lfm.train.batches import Numbers, once
from lfm.train.fit import fit

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch
    from lfm.core.method import Run
    from lfm.data.records import Record
    from lfm.data.task import Task
    from lfm.train.setting import Fit

LEARNT = ("text", "completion", "chat", "label", "pair", "image", "audio", "fact")
"""The kinds of records that a model can be taught, each as its task."""

FAR = 10.0
"""How many times the loss of guessing is no training's; a few records learned hard may come to some times."""

LAST = 4
"""Steps over which a training's loss in the end is taken."""

RECORDS = {
    "train": DataSlot(Data.FEW_SHOT, LEARNT, help="what it should learn"),
    "dev": DataSlot(Data.FEW_SHOT, LEARNT, optional=True, help="held out: for patience"),
}
"""The data roles of methods that teach."""


def plain(module: nn.Module, batch: Batch, task: Task) -> Tensor:
    """The task's own loss."""
    return task.loss(forward(module, batch), batch)


def taught(
    module: nn.Module,
    model: Model,
    records: Sequence[Record],
    config: Fit,
    run: Run,
    *,
    dev: Sequence[Record] = (),
    pack: int = 0,
    name: str = "fit",
    scale: Callable[[str], float] = lambda parameter: 1.0,
    objective: Callable[[nn.Module, Batch, Task], Tensor] = plain,
) -> tuple[float, ...]:
    """Train the module's parameters that require gradients, by the loss of the task that the records set the model.

    dev: held-out records, looked at after each epoch by the task's own loss. objective: what is trained by, where that
    is another: (module, batch, task) → mean over the batch. pack: tokens of a row that records share; 0: each has its
    own. The losses of the first and last step go into the run's notes. DivergedError where the last are far worse than
    guessing; DataError, MismatchError where the records set the model no task, or cannot be packed.
    """
    codec = model.ask(Codec)
    fitted = tasks.fit(records, codec, model.facts)
    held = tasks.fit(dev, codec, model.facts) if len(dev) else ()
    task = tasks.task_for([*fitted, *held], codec, model.facts)
    both = [*fitted, *held]

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return (objective if module.training else plain)(module, batch, task)

    chosen: Sequence[Any]
    beside: Sequence[Any]
    if pack:

        def logits(batch: Batch) -> Tensor:
            with torch.no_grad():
                return forward(module, batch)

        rows = packing.packed(both, task.collate, model.facts, pack)
        own = packing.packed(fitted, task.collate, model.facts, pack)
        mode = module.training
        module.eval()
        packing.held_apart(logits, both, task.collate)
        module.train(mode)
        chosen, beside, collate = own.rows, [(len(fitted) + i,) for i in range(len(held))], rows.collate
        run.note(rows=len(own.rows), filled=round(own.filled, 4))
    else:
        numbers, collate = once(both, task.collate)
        chosen = cast("Sequence[Any]", Numbers(fitted))  # the same numbers, and where each is found
        beside = numbers[len(fitted) :]
    losses = fit(module, chosen, collate, loss, config, run, name=name, scale=scale, dev=beside)
    _better_than_guessing(losses, model, config, name)
    run.note(loss_before=losses[0], loss_after=losses[-1])
    return losses


def _better_than_guessing(losses: Sequence[float], model: Model, config: Fit, name: str) -> None:
    """DivergedError where training ended at many times the loss of a guess among all answers, and of its beginning."""
    guess = math.log(max(len(model.facts.labels) or model.facts.vocabulary, 2))
    ended = mean(losses[-LAST:])
    if len(losses) > LAST and ended > FAR * max(losses[0], guess):
        raise DivergedError(
            f"{name} did not learn: its loss is {ended:.3g} in the end",
            why=f"it began with {losses[0]:.3g}, and guessing among all answers comes to {guess:.3g}",
            fix=f"try lr={config.lr / 10:.0e}, or a longer warmup",
        )
