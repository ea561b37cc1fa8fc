"""Train a student on a teacher's softened answers.

    L = (1 − α) CE(y, p) + α T² D(pᵗ_T, p_T),   p_T = softmax(logits / T)

Paper: Distilling the knowledge in a neural network, arXiv 1503.02531. D is KL(teacher ‖ student) as there (`forward`),
KL(student ‖ teacher) (`reverse`, as in 2306.08543), or Jensen–Shannon (`jsd`, 2306.13649). Differs: language models too
are distilled, at every position that the task scores; and the student may begin as the teacher's own architecture with
fewer blocks (give one reference for both roles, and `layers`).

The defaults (T = 4, α = .9) suit classifiers. For a language model begin with temperature=1: in one short trial (2 of
the 5 blocks of a 0.26 M story model, 150 steps, seed 0) the loss on other stories was 2.59 by labels alone, 2.61 with
T = 1, 2.80 with T = 4.

Models: teacher (Logits, Codec), student (Gradients, Codec). Two language models must share kind and vocabulary; two
classifiers the names of their classes, in any order; each then reads the records its own way. Data: every kind; with
alpha=1 the classes of records may be empty. A classifying teacher is asked once a record; its answers (N, classes) are
kept. Errors: MismatchError before any weight is read; ConfigError where a class is empty and alpha < 1; DivergedError.

    lfm run distill.response teacher=big student=small train=texts.jsonl --set temperature=4 --out taught
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Logits, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import ConfigError, MismatchError
from lfm.core.heavy import F, nn, torch
from lfm.data import task as tasks
from lfm.models import forward, layers
from lfm.train import Fit, fit, once, seeded, training
from lfm.train.losses import Divergence, kd

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.model import Batch
    from lfm.data.records import Record

LIMIT = 2**28
"""Bytes of a teacher's answers that are kept."""


class Config(Fit, frozen=True):
    temperature: Annotated[float, Meta(gt=0, description="T, of both models' answers")] = 4.0
    alpha: Annotated[float, Meta(ge=0, le=1, description="weight of the teacher's answers against the labels'")] = 0.9
    divergence: Annotated[Divergence, Meta(description="forward, reverse, or jsd between the two answers")] = "forward"
    layers: Annotated[int, Meta(ge=0, description="blocks of the student to keep, evenly spaced; 0: all")] = 0
    start: Annotated[
        Literal["weights", "random"], Meta(description="whether the student begins with its weights or new ones")
    ] = "weights"


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    teacher, student = inputs.model("teacher"), inputs.model("student")
    codec = student.ask(Codec)
    records = tasks.fit(_with_classes(config, inputs.records("train"), student), codec, student.facts)
    task = tasks.task_for(records, codec, student.facts)
    gradients = student.ask(Gradients)
    module = _student(gradients.module(), config, run)
    numbers, collate = once(records, task.collate)
    answers = _answers(teacher, student, records, task, run)

    def with_answers(chosen: Sequence[int]) -> Batch:
        batch = collate(chosen)
        return {**batch, "teacher": answers(chosen, batch)}

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        logits, labels = task.scored(forward(module, batch), batch)
        theirs = batch["teacher"]
        width = min(logits.shape[-1], theirs.shape[-1])  # a vocabulary may be padded to a round number
        told = kd(logits[:, :width], theirs[:, :width], config.temperature, config.divergence)
        if config.alpha == 1:
            return told
        return (1 - config.alpha) * F.cross_entropy(logits, labels) + config.alpha * told

    losses = fit(module, numbers, with_answers, loss, config, run)
    run.note(loss_before=losses[0], loss_after=losses[-1])
    return gradients.rewrap(module)


def _student(module: nn.Module, config: Config, run: Run) -> nn.Module:
    if config.layers:
        module = layers.shallower(module, config.layers)
    if config.start == "weights":
        return module
    settings: Any = getattr(module, "config", None)
    if settings is None:
        raise ConfigError("start=random needs an architecture of transformers", why="this module names no config")
    with seeded(run.seed_for("student")):
        return type(module)(settings).requires_grad_(True)


def _answers(
    teacher: Model, student: Model, records: Sequence[Record], task: tasks.Task, run: Run
) -> Callable[[Sequence[int], Batch], Tensor]:
    """(records' numbers, their batch) → the teacher's logits at the places that are scored."""
    ask = teacher.ask(Logits).logits
    if student.facts.task in tasks.LANGUAGE:
        return lambda chosen, batch: task.scored(ask(batch), batch)[0].clone()  # what is inferred takes no part in grad
    own = tasks.task_for(records, teacher.ask(Codec), teacher.facts)
    order = [teacher.facts.labels.index(name) for name in student.facts.labels]

    def asked(chosen: Sequence[int]) -> Tensor:
        return ask(own.collate([records[i] for i in chosen])).cpu()[:, order].clone()

    if 4 * len(records) * len(order) > LIMIT:
        return lambda chosen, batch: asked(chosen)
    parts = [range(i, min(i + 64, len(records))) for i in range(0, len(records), 64)]
    kept = run.step("teacher", lambda: torch.cat([asked(part) for part in run.track(parts, "teacher")]))
    return lambda chosen, batch: kept[list(chosen)]


def _with_classes(config: Config, records: Sequence[Any], student: Model) -> Sequence[Any]:
    """Records without a class get any class where alpha leaves the classes unread."""
    if all(getattr(record, "label", "none asked") for record in records):
        return records
    if config.alpha < 1:
        raise ConfigError("records have no class", why=f"alpha={config.alpha} also learns from classes", fix="alpha=1")
    any_class = student.facts.labels[0]
    return [r if r.label else msgspec.structs.replace(r, label=any_class) for r in records]


def agree(config: Config, inputs: Inputs) -> None:
    teacher, student = inputs.model("teacher"), inputs.model("student")
    t, s = teacher.facts, student.facts
    if t.task != s.task:
        raise MismatchError(
            f"a {s.task or 'model without a task'} cannot learn the answers of a {t.task or 'model without a task'}",
            why=f"{student.ref} and {teacher.ref} answer different questions",
        )
    if s.task in tasks.LANGUAGE:
        if t.vocabulary_digest != s.vocabulary_digest and _vocabulary(teacher) != _vocabulary(student):
            raise MismatchError(
                "teacher and student have different vocabularies",
                why=f"{teacher.ref} has {t.vocabulary} tokens, {student.ref} {s.vocabulary}",
                fix="give a student that was made with the teacher's tokenizer",
            )
    elif set(t.labels) != set(s.labels) or not s.labels:
        shown = ["; ".join(labels[:5]) or "none" for labels in (t.labels, s.labels)]
        raise MismatchError(
            "teacher and student have different classes",
            why=f"the teacher's: {shown[0]}; the student's: {shown[1]}",
            fix="rename the classes in one config (id2label)",
        )


def _vocabulary(model: Model) -> dict[str, int]:
    return model.ask(Codec).tokenizer.get_vocab()


def cost(config: Config, sizes: Sizes) -> Cost:
    teacher, student = sizes.model("teacher"), sizes.model("student")
    part = config.layers / student.layers if config.layers and student.layers else 1.0
    smaller = student._replace(parameters=int(student.parameters * part), layers=int(student.layers * part))
    whole = training(config, smaller, sizes.data["train"], forwards=teacher.parameters)
    return whole._replace(memory=whole.memory + 4 * student.parameters)


METHOD = Method(
    paper="arXiv:1503.02531",
    config=Config,
    models={
        "teacher": Slot((Logits, Codec), help="the model whose answers are learned"),
        "student": Slot((Gradients, Codec), help="the model that learns them"),
    },
    data={
        "train": DataSlot(
            Data.UNLABELED,
            ("text", "completion", "label", "pair", "image", "fact"),
            help="what the teacher is asked; text and classless records will do",
        )
    },
    run=run,
    cost=cost,
    agree=agree,
)
