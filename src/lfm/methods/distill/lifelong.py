"""Teach a model a new task, with what it answered before as its teacher, so that it forgets less: no old data is kept.

    L = CE(y, p(x)) + λ T² KL(p⁰_T(x) ‖ p_T(x)),   x of the new task alone, p⁰ the model before it, over its own classes

Paper: Learning without forgetting, arXiv 1606.09282 (T = 2 as there). A classifier gets a row of its head for each
class that the records name and it lacks, and p⁰ teaches the old rows. Records of several groups are learned group by
group, each from the model as it then is. Differs: with the T² of 1503.02531, so that the paper's λ is T² ours; one
softmax over old and new classes for the labels, so that what is made is an ordinary classifier that need not be told
the task (the paper's heads are apart: to ask as there, look at a task's own classes alone); no warm-up of the new head
by itself. A language model answers for every place of the new text that is scored.

Measured (docs/distilling.md): a ViT that has learned digits 5 to 9 tells 0 to 4 apart .917 right, fine-tuned .334, and
before .956; asked among all ten it puts most old digits among the new classes (.206 right; fine-tuned 0). Where old and
new inputs share their classes (digits upright and turned), what the old model says of the new ones may be wrong: then
see tune.remind, tune.adapters_continual.

Models: model (Logits, Gradients, Codec), any task; new classes need a last linear layer with a row a class. Data: every
kind, with labels. Errors: ModelError where the head cannot grow; DataError; DivergedError.

    lfm run distill.lifelong model=base train=tasks.jsonl --set keep=1 --out learned
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Logits, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.heavy import nn
from lfm.data import task as tasks
from lfm.data.records import Record
from lfm.data.shares import by_group
from lfm.data.suited import classed, fitting, worded
from lfm.distilling import lesson as lessons
from lfm.distilling.classes import widened
from lfm.distilling.telling import gap, hard
from lfm.distilling.together import paired
from lfm.models import forward
from lfm.train import Fit, fit, training

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch


class Config(Fit, frozen=True):
    keep: Annotated[float, Meta(ge=0, description="λ, of what it answered before against the new labels")] = 1.0
    temperature: Annotated[float, Meta(gt=0, description="T, of what it answered before and answers now")] = 2.0


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    for place, records in enumerate(by_group(inputs.records("train")).values()):
        model = learned(config, model, records, run, place)
    return model


def learned(config: Config, before: Model, records: Sequence[Record], run: Run, place: int) -> Model:
    """The model, having learned one more task."""
    after, new = before, unknown(records, before)
    if new:
        wider = widened(before.ask(Gradients).module(), before.facts.labels, new, run.generator("classes", place))
        after = before.ask(Gradients).rewrap(wider)
    speaks = before.facts.task in tasks.LANGUAGE
    lesson = lessons.lesson(records, before, before) if speaks else paired(records, records, before, after)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        logits, labels = lesson.task.scored(forward(module, batch), batch)
        # of a wider head, what was told is of the first rows, which are its own
        return hard(logits, labels) + config.keep * gap(logits, batch, config.temperature)

    module = after.ask(Gradients).module()
    told = lessons.told(lesson, before, run, f"before-{place}")
    losses = fit(module, lesson.numbers, told, loss, config, run, name=f"task-{place}")
    run.note(**{f"loss_{place}": losses[-1], f"new_classes_{place}": len(new)})
    return after.ask(Gradients).rewrap(module)


def unknown(records: Sequence[Record], model: Model) -> list[str]:
    """The classes that these records name and a classifier lacks, in the order in which they appear."""
    if model.facts.task in tasks.LANGUAGE:
        return []
    known = model.facts.labels
    numbered = not any(name.isdecimal() for name in known)  # then a numeral is a class's place
    named = dict.fromkeys(str(getattr(record, "label", "")) for record in records)
    return [n for n in named if n not in known and not (numbered and n.isdecimal() and int(n) < len(known))]


def agree(config: Config, inputs: Inputs) -> None:
    model, records = inputs.model("model"), inputs.records("train")
    worded(records)
    classed(records)
    tasks.suits(records, model.facts)
    fitting(records, model, model.facts._replace(labels=()))  # classes that it has not are new ones


def cost(config: Config, sizes: Sizes) -> Cost:
    model = sizes.model("model")
    return training(config, model, sizes.data["train"], forwards=model.parameters)


METHOD = Method(
    paper="arXiv:1606.09282",
    config=Config,
    models={"model": Slot((Logits, Gradients, Codec), help="the model that learns on")},
    data={
        "train": DataSlot(
            Data.FEW_SHOT,
            ("text", "completion", "label", "pair", "image", "audio", "fact"),
            help="the new task; or several, each a group, in the order in which they are learned",
        )
    },
    forms=("checkpoint",),
    run=run,
    cost=cost,
    agree=agree,
)
