"""A module taught records as their task: for methods that say which weights train, how fast, what is averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from lfm.core.errors import DataError, DivergedError
from lfm.core.heavy import torch
from lfm.core.method import Data, DataSlot
from lfm.core.model import Codec, Gradients, Model
from lfm.data import heads, packing
from lfm.data import task as tasks
from lfm.data.chat import rendered
from lfm.data.files import where
from lfm.data.records import Chat, Record, Text, kind_of
from lfm.data.wording import wording
from lfm.models import forward
from lfm.train.batches import once
from lfm.train.fit import fit

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.method import Inputs, Run
    from lfm.core.model import Batch
    from lfm.data.task import Task
    from lfm.train.setting import Fit

LEARNT = ("text", "completion", "chat", "label", "pair", "image", "audio", "fact")
"""The kinds of records that a model can be taught, each as its task."""
WORDS = {
    "text": ("text",),
    "label": ("text",),
    "pair": ("text", "text_b"),
    "completion": ("completion",),
    "fact": ("prompt", "object"),
}
"""Of a kind of records, the fields that must not be blank; an empty prompt is one."""

CLASSED = "name its class, or leave the record out"

SPECIAL = 8
"""Tokens that a model may put around an answer, at most."""

FAR = 10.0
"""How many times the loss of guessing is no training's; a few records learned hard may come to some times."""

LAST = 4
"""Steps over which a training's loss in the end is taken."""

RECORDS = {
    "train": DataSlot(Data.FEW_SHOT, LEARNT, help="what it should learn"),
    "dev": DataSlot(Data.FEW_SHOT, LEARNT, optional=True, help="held out: for patience"),
}
"""The data roles of methods that teach."""


def suited(config: Any, inputs: Inputs, *, classed: bool = True) -> None:
    """A method's `agree`: whether its records set the model that it trains a task, before any weight is read.

    classed: whether records of classes must say theirs. DataError naming the record that is blank or of no class, whose
    class is none of a classifier's, that a chat template does not take, or whose answer is longer than the context.
    """
    models = [model for given in inputs.models.values() for model in given if model.can(Gradients)]
    for records in inputs.data.values():
        worded(records)
        if len(records) and models:
            tasks.suits(records, models[0].facts)
            _fitting(records, models[0], classed)


def worded(records: Sequence[Record]) -> None:
    """DataError naming the record that has nothing to read, or nothing to say, where its kind asks for words."""
    asked = WORDS.get(kind_of(records[0]), ()) if len(records) else ()
    for place, record in enumerate(records):
        for field in asked:
            if not getattr(record, field).strip():
                raise DataError(
                    f"{where(records, place)}: {field!r} is blank",
                    why="a model learns nothing from it",
                    fix="give it words, or leave the record out",
                )


def _fitting(records: Sequence[Record], model: Model, classed: bool) -> None:
    classes: set[str] = set()
    facts = model.facts
    headed = facts.task.endswith("-classification") and bool(facts.labels)
    task: Task | None = None
    for place, record in enumerate(records):
        try:
            label = getattr(record, "label", None)
            if label is not None and classed and not label.strip():
                raise DataError("'label' is blank", why="there is no class to learn", fix=CLASSED)
            if headed and label and label not in classes:
                heads.class_of(label, facts)
                classes.add(label)
            if _may_not_fit(record, model):
                task = task or tasks.task_for(records, model.ask(Codec), facts)
                task.collate([record])
        except DataError as error:
            raise DataError(f"{where(records, place)}: {error.what}", why=error.why, fix=error.fix) from None


def _may_not_fit(record: Record, model: Model) -> bool:
    """Whether a language model's answer has more bytes than its context tokens, so that it is worth tokenising."""
    if model.facts.task not in tasks.LANGUAGE or isinstance(record, Text):
        return False
    if isinstance(record, Chat):
        text, said = rendered(record, model.ask(Codec).tokenizer)
        answer = text[said[-1][0] :] if said else ""
    else:
        asked = wording(record)
        answer = asked.answer + asked.suffix
    return 0 < model.facts.context < len(answer.encode()) + SPECIAL


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
        chosen, beside = numbers[: len(fitted)], numbers[len(fitted) :]
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
