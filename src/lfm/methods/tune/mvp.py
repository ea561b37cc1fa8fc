"""Tune a language model to classify through its own head: templates with a blank, and words for each class (MVP).

    s_c(x) = mean over templates t of max over words w of c of  logit(w | t(x)),   L = CE(s(x), y)
    adversarial: CE(s(e + δ), y),  δ = Π_ε(δ₀ + 1.5 ε g/‖g‖),  g = ∂L/∂δ at e + δ₀,  ‖δ₀‖ = ε

Paper: Model-tuning Via Prompts Makes NLP Models Adversarially Robust, arXiv 2303.07320, and its code (acmi-lab/mvp):
no new parameter is drawn at random, so tuning need not bend the features to one. All weights are tuned. With
epsilon > 0 each step is trained on embeddings e moved to raise the loss: one ℓ2 step, projected to ε, its gradient
taken with dropout off (ε = 1 in the paper). A causal model's and an encoder-decoder's answer is what comes next, so
that their templates end in the blank. Differs from the paper: the default templates ask nothing of a particular task.
A text that does not fit the context beside its template loses its end.

Models: masked, causal and encoder-decoder language models with Gradients and a codec. Data: label and pair records; the
classes are those of the records, in alphabetical order. Result: a program that answers as a text classifier, with its
own weights; `--format checkpoint` is the tuned language model by itself. Errors: DataError for a model without a
language head or records of one class; ConfigError for templates without gaps, or words that are not one token.

    lfm run tune.mvp model=base train=train.jsonl --set epsilon=1 --out tuned
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgspec

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Model, Parts, Run, Sizes, Slot
from lfm.core.errors import DataError
from lfm.core.model import Facts
from lfm.data import heads
from lfm.data import task as tasks
from lfm.data.records import Label, Pair
from lfm.data.suited import fitting
from lfm.models import forward, local
from lfm.models.mixing import load_into, parameters_of
from lfm.models.program import program
from lfm.train import Fit, fit, once, suited, training
from lfm.train.batches import Numbers
from lfm.train.embeddings import changed_embeddings, raising

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch
    from lfm.data.task import Task
    from lfm.models.templated import Form

ID = "tune.mvp"

TEMPLATES = {
    "masked-lm": ("{mask} : {text}", "{text} : {mask} .", "A {mask} text : {text}", "{text} This is {mask} ."),
    "": ("{text} : {mask}", "{text} This is {mask}", "{text} It is {mask}", "{text} Category : {mask}"),
}
PAIRS = {
    "masked-lm": (
        "{text} ? {mask} , {text_b}",
        "{text} {mask} : {text_b}",
        "{text} {text_b} : {mask} .",
        "{text} {text_b} This is {mask} .",
    ),
    "": tuple(template.replace("{text}", "{text} {text_b}") for template in TEMPLATES[""]),
}
"""By the model's task: where nothing may follow the blank, and where something may."""

REACH = 1.5
"""Of the step, in ε."""


class Config(Fit, frozen=True):
    templates: Annotated[
        tuple[str, ...], Meta(description="with {text}, {mask} and for pairs {text_b}; empty: four plain ones")
    ] = ()
    words: Annotated[
        dict[str, tuple[str, ...]], Meta(description="class → words that speak for it; its name if absent")
    ] = msgspec.field(default_factory=dict)
    epsilon: Annotated[float, Meta(ge=0, description="ε: norm by which a record's embeddings are moved; 0: not")] = 0.0
    lr: Annotated[float, Meta(gt=0, description="peak learning rate (AdamW)")] = 1e-4


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    from lfm.models.templated import Templated

    model = inputs.model("model")
    train, dev = (cast("Sequence[Label | Pair]", inputs.records(role)) for role in ("train", "dev"))
    records = [*train, *dev]
    state = told(train, model, config)
    facts = model.facts._replace(task=CLASSIFIER, labels=tuple(state["facts"]["labels"]))
    task = heads.texts(model.ask(Codec), facts)
    module = Templated(model.ask(Gradients).module(), formed(model, state))
    if tasks.one_kind(records) is Pair:
        module.parts(task.collate(records[:1])["input_ids"][0].tolist())

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return objective(module, batch, task, config.epsilon if module.training else 0.0)

    numbers, collate = once(records, task.collate)
    losses = fit(module, Numbers(train), collate, loss, config, run, dev=numbers[len(train) :])
    run.note(loss_before=losses[0], loss_after=losses[-1])
    tensors = {name: tensor.cpu() for name, tensor in parameters_of(module.base).items()}
    made = program(ID, config, Parts({"model": (model,)}, tensors, state), opened)

    def checkpoint(out: Path) -> Model:
        return model.ask(Gradients).rewrap(module.base).save(out, "checkpoint")

    return replace(made, formats={**made.formats, "checkpoint": checkpoint}, _opened={})


CLASSIFIER = "text-classification"


def told(records: Sequence[Label | Pair], model: Model, config: Config) -> dict[str, Any]:
    """The templates, the words and the facts that the classifier goes by, all of them named."""
    facts = model.facts
    if facts.task not in tasks.LANGUAGE:
        raise DataError(
            f"MVP reads classes from a language model's head; {model.ref} is {facts.task or 'of no known task'}",
            fix="a masked, causal or encoder-decoder language model; tune.r3f or tune.full for a classifier",
        )
    labels = sorted({record.label for record in records})
    if len(labels) < 2:
        raise DataError(f"all records are of the class {labels[0]!r}", fix="give records of two classes or more")
    usual = PAIRS if tasks.one_kind(records) is Pair else TEMPLATES
    return {
        "templates": list(config.templates or usual.get(facts.task, usual[""])),
        "words": {label: list(config.words.get(label, (label,))) for label in labels},
        "facts": {"task": CLASSIFIER, "labels": labels},
    }


def formed(model: Model, state: Mapping[str, Any]) -> Form:
    """The templates and words in the model's own tokens."""
    from lfm.data.language import context_of
    from lfm.models.templated import form

    tokenizer = model.ask(Codec).tokenizer
    limit = context_of(tokenizer, model.facts)
    return form(tokenizer, model.facts.task, limit, state["templates"], state["words"])


def objective(module: Any, batch: Batch, task: Task, epsilon: float) -> Tensor:
    """CE of what the templates tell; with epsilon, where each record's embeddings are moved to raise it."""
    if not epsilon:
        return task.loss(forward(module, batch), batch)
    moved = worst(module, batch, task, epsilon)
    with changed_embeddings(module.base, lambda x: x + moved):
        return task.loss(forward(module, batch), batch)


def worst(module: Any, batch: Batch, task: Task, epsilon: float) -> Tensor:
    """δ (rows, T, width), one step from a random δ₀, each row's norm at most ε."""
    return raising(module, module.base, lambda: task.loss(forward(module, batch), batch), epsilon, REACH * epsilon)


def opened(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """A text classifier: the model with the tuned weights, asked through its templates."""
    base = parts.model("model")

    def built() -> nn.Module:
        from lfm.models.templated import Templated

        module = load_into(base.ask(Gradients).module(), parts.tensors)
        return Templated(module, formed(base, parts.state)).eval()

    given = local.interfaces(CLASSIFIER, built, lambda: base.ask(Codec))
    return dict(given) | {Codec: lambda: base.ask(Codec)}


def agree(config: Config, inputs: Inputs) -> None:
    model, dev = inputs.model("model"), inputs.records("dev")
    labels = told(cast("Sequence[Label | Pair]", inputs.records("train")), model, config)["facts"]["labels"]
    suited(config, inputs)
    fitting(dev, model, model.facts._replace(task=CLASSIFIER, labels=tuple(labels)))


def cost(config: Config, sizes: Sizes) -> Cost:
    facts: Facts = sizes.model("model")
    asked = len(config.templates) or len(TEMPLATES[""])
    given = sizes.data["train"]
    longer = given._replace(tokens=asked * (given.tokens + 5 * given.records))
    tuning = training(config, facts, longer)
    return tuning._replace(flops=tuning.flops * (2 if config.epsilon else 1), disk=4 * facts.parameters)


METHOD = Method(
    paper="arXiv:2303.07320",
    config=Config,
    models={"model": Slot((Gradients, Codec), help="the language model to tune")},
    data={
        "train": DataSlot(Data.FEW_SHOT, ("label", "pair"), help="texts and their classes"),
        "dev": DataSlot(Data.FEW_SHOT, ("label", "pair"), optional=True, help="held out: for patience"),
    },
    agree=agree,
    run=run,
    cost=cost,
    open=opened,
    forms=("program", "checkpoint"),
)
