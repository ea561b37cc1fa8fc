"""A classifier from a few labels and many texts without: soft prompts, a prototype for each class, pseudo-labels.

    p(c | x) = mean_k softmax_c s(W_k h_k(x), v_kc),   h_k: the state in the blank of [P_k; x; blank],   s = cos / τ
    L = mean_i −log softmax_{y_i} s(W h_i, v)  +  mean_{i, j: y_i = y_j} −log e^s_ij / (e^s_ij + Σ_{y_l ≠ y_i} e^s_il)
    a round: the unlabelled texts are told; of those told to be of a class, the surest are taken at their word; P, W and
    v are trained anew, on the labels and these

Paper: Scalable Prompt Generation for Semi-supervised Learning with Language Models, arXiv 2302.09236: prompts that
differ in how many soft tokens they have, an ensemble that labels, and the prototypical verbalizer (2203.09770; L is its
code's formula up to a factor, s_ij that of W h_i and W h_j), so that nobody writes prompts or words. Differs: the
language model stays frozen, P, W and v are all that trains; prototypes begin as the means of their classes; what is
learned from pseudo-labels is the same ensemble, where there a classifier is fine-tuned on soft labels; τ is a setting
(1 there); no demonstrations, its other source of different prompts.

Models: causal and masked language models with Gradients and a codec; the blank is the mask, or what comes next. Data:
train, of label or pair records; unlabeled: more texts, whose labels, if they have any, are not looked at; without them
it is the supervised part alone. Result: a program over the model giving Classes, Logits of them, and their names as
text. Errors: DataError for records of one class, for texts where there should be pairs, for a model that is no causal
or masked language model; ConfigError for a template without its gaps, or prompts that leave no room for text.

    lfm run prompt.semi_supervised model=base train=few.jsonl unlabeled=texts.jsonl --set steps=10 --out classifier
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, cast, final

import msgspec

from lfm.core import (
    Codec,
    Cost,
    Data,
    DataSlot,
    Gradients,
    Inputs,
    Logits,
    Meta,
    Method,
    Model,
    Parts,
    Run,
    Sizes,
    Slot,
)
from lfm.core.errors import ConfigError, DataError
from lfm.core.heavy import np, torch
from lfm.core.method import Amount
from lfm.data import heads
from lfm.data.records import Label, Pair, Text
from lfm.data.suited import worded
from lfm.models import forward, local
from lfm.models.program import program
from lfm.prompting.classifier import labels_of, spoken
from lfm.train import Fit, fit, training
from lfm.tuners import prompts

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch
    from lfm.models.templated import Form
    from lfm.tuners.prototypes import Prototyped

ID = "prompt.semi_supervised"
CLASSIFIER = "text-classification"
TASKS = ("causal-lm", "masked-lm")
READ = 32
"""Texts that are told at once."""
TEMPLATES = {Label: "{text} {mask}", Pair: "{text} {text_b} {mask}"}


class Config(Fit, frozen=True):
    prompt_tokens: Annotated[tuple[int, ...], Meta(description="length of each prompt")] = (
        1,
        2,
        3,
        4,
        5,
    )
    rounds: Annotated[int, Meta(ge=1, description="times that the unlabelled texts are told and learned from")] = 2
    share: Annotated[float, Meta(gt=0, le=1, description="of the texts told to be of a class, the surest")] = 0.5
    dimension: Annotated[int, Meta(ge=1, description="of the vectors that prototypes are compared with")] = 64
    temperature: Annotated[float, Meta(gt=0, description="τ, by which cosines are divided")] = 1.0
    template: Annotated[str, Meta(description="with {text}, {mask} and for pairs {text_b}; empty: these alone")] = ""
    steps: Annotated[int, Meta(ge=0, description="optimizer steps a round; 0: as many as `epochs` asks")] = 60
    lr: Annotated[float, Meta(gt=0, description="peak learning rate (AdamW)")] = 0.01


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model, train = inputs.model("model"), cast("Sequence[Label | Pair]", inputs.records("train"))
    labels = labels_of(train)
    state = {"template": worded_by(config, train), "facts": {"task": CLASSIFIER, "labels": list(labels)}}
    collate = collated(model, labels)
    unlabeled, dev = unnamed(inputs.records("unlabeled"), labels[0]), list(inputs.records("dev"))
    module = made(config, model, state, begin(config, model, len(labels), run))
    if isinstance(train[0], Pair):
        module.templated.parts(collate(train[:1])["input_ids"][0].tolist())
    start = trained(module)

    def learnt(records: Sequence[Label | Pair], name: str) -> dict[str, Tensor]:
        put(module, start)
        module.prototypes.data.copy_(means(module, collate, records, len(labels)))
        losses = fit(module, records, collate, loss, config, run, name=name, dev=dev)
        run.note(loss_before=losses[0], loss_after=losses[-1])
        return trained(module)

    tensors = run.step("labels", lambda: learnt(train, "labels"))
    for turn in range(1, config.rounds + 1 if unlabeled else 1):
        put(module, tensors)
        told = run.step(f"told-{turn}", lambda: tell(lambda batch: forward(module, batch), collate, unlabeled))
        taken = [msgspec.structs.replace(unlabeled[i], label=labels[c]) for i, c in surest(told, config.share)]
        tensors = run.step(f"round-{turn}", lambda: learnt([*train, *taken], f"round-{turn}"))  # noqa: B023
        run.note(taken=len(taken))
    return program(ID, config, Parts({"model": (model,)}, tensors, state), opened)


def surest(told: Tensor, share: float) -> list[tuple[int, int]]:
    """(record, class): of the records that each class is the likeliest of, the `share` told with most probability.

    told: (n, classes) log-probabilities. At least one of each class that any record is told to be of.
    """
    high, best = told.max(1)
    chosen: list[tuple[int, int]] = []
    for c in range(told.shape[1]):
        rows = (best == c).nonzero()[:, 0]
        order = high[rows].argsort(descending=True, stable=True)
        chosen += [(int(i), c) for i in rows[order][: math.ceil(share * len(rows))]]
    return sorted(chosen)


def unnamed(records: Sequence[Label | Pair | Text], label: str) -> list[Label | Pair]:
    """The texts with no label but this one, which stands for none."""
    return [
        Pair(text=r.text, text_b=r.text_b, label=label) if isinstance(r, Pair) else Label(text=r.text, label=label)
        for r in records
    ]


def worded_by(config: Config, records: Sequence[Label | Pair]) -> str:
    return config.template or TEMPLATES[type(records[0])]


def collated(model: Model, labels: tuple[str, ...]) -> Callable[[Sequence[Any]], Batch]:
    return heads.texts(model.ask(Codec), model.facts._replace(task=CLASSIFIER, labels=labels)).collate


def formed(config: Config, model: Model, template: str) -> Form:
    """The template in the model's own tokens, with room for the longest prompt."""
    from lfm.data.language import context_of
    from lfm.models.templated import form

    tokenizer = model.ask(Codec).tokenizer
    limit = context_of(tokenizer, model.facts)
    return form(tokenizer, model.facts.task, limit and limit - max(config.prompt_tokens), [template], {})


def begin(config: Config, model: Model, classes: int, run: Run) -> dict[str, Tensor]:
    """What trains, before it does: prompts of random words, a random W each, no prototypes yet."""
    module, random = model.ask(Gradients).module(), run.generator("begin")
    count, width = len(config.prompt_tokens), prompts.table(module).shape[1]
    rows = {f"prompts.{k}": prompts.vocabulary_rows(module, t, random) for k, t in enumerate(config.prompt_tokens)}
    project = torch.randn(count, config.dimension, width, generator=random) / width**0.5
    return {**rows, "project": project, "prototypes": torch.zeros(count, classes, config.dimension)}


def made(config: Config, model: Model, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Prototyped:
    """The model with these prompts, projections and prototypes."""
    from lfm.tuners.prototypes import Prototyped
    from lfm.tuners.weaves import leading

    rows = [tensors[f"prompts.{k}"] for k in range(len(config.prompt_tokens))]
    form, codec = formed(config, model, state["template"]), model.ask(Codec)
    return Prototyped(
        model.ask(Gradients).module(),
        form,
        leading(codec.tokenizer),
        rows,
        tensors["project"],
        tensors["prototypes"],
        config.temperature,
    ).eval()


def means(module: Prototyped, collate: Callable[..., Batch], records: Sequence[Any], classes: int) -> Tensor:
    """(prompts, classes, m): of each class's records the mean vector."""
    batches = [collate(records[i : i + READ]) for i in range(0, len(records), READ)]
    with torch.no_grad():
        read = torch.cat([module.vectors(b["input_ids"], b["attention_mask"]) for b in batches], 1)
    labels = torch.cat([b["labels"] for b in batches]).to(read.device)
    return torch.stack([read[:, labels == c].mean(1) for c in range(classes)], 1)


def loss(module: Any, batch: Batch) -> Tensor:
    return module.loss(batch["input_ids"], batch["attention_mask"], batch["labels"])


def tell(logits: Callable[[Batch], Tensor], collate: Callable[..., Batch], records: Sequence[Any]) -> Tensor:
    """(n, classes) log-probabilities, texts of nearly one length together."""
    order = sorted(range(len(records)), key=lambda i: len(records[i].text))
    groups = [order[i : i + READ] for i in range(0, len(order), READ)]
    with torch.no_grad():
        told = torch.cat([logits(collate([records[i] for i in some])).cpu() for some in groups])
    return told[torch.tensor(order).argsort()]


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu().clone() for name, p in module.named_parameters() if p.requires_grad}


def put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    module.load_state_dict(dict(tensors), strict=False)


def opened(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """A text classifier: the model behind its prompts and prototypes."""
    model, labels = parts.model("model"), tuple(parts.state["facts"]["labels"])
    codec = partial(model.ask, Codec)
    logits = local.interfaces(CLASSIFIER, partial(made, config, model, parts.state, parts.tensors), codec)[Logits]
    return {Logits: logits, Codec: codec, **spoken(PrototypeClasses(model, labels, logits))}


@final
class PrototypeClasses:
    """Classes by prototypes."""

    def __init__(self, model: Model, labels: tuple[str, ...], logits: Callable[[], Any]) -> None:
        self._model, self._labels, self._logits = model, labels, logits

    @property
    def labels(self) -> tuple[str, ...]:
        return self._labels

    def tell(self, records: Sequence[Any]) -> NDArray[np.float64]:
        if not len(records):
            return np.empty((0, len(self._labels)))
        collate = collated(self._model, self._labels)
        return tell(self._logits().logits, collate, unnamed(records, self._labels[0])).double().numpy()


def agree(config: Config, inputs: Inputs) -> None:
    model, train = inputs.model("model"), inputs.records("train")
    if model.facts.task not in TASKS:
        raise DataError(
            f"{model.ref} is a model for {model.facts.task or 'no task that is known'}: it has no blank to be read",
            fix="a causal or a masked language model; prompt.api_few_shot for an encoder",
        )
    labels = labels_of(train)
    for records in inputs.data.values():
        worded(records)
    for role in ("unlabeled", "dev"):
        other = inputs.records(role)
        if len(other) and isinstance(other[0], Pair) != isinstance(train[0], Pair):
            raise DataError(f"train and {role} must both hold pairs of texts, or both single texts")
    if strange := sorted({record.label for record in inputs.records("dev")} - set(labels)):
        raise DataError(f"dev holds {', '.join(strange)}, of which train has no record")
    if not config.prompt_tokens or min(config.prompt_tokens) < 1:
        raise ConfigError("every prompt needs a token at least", fix="prompt_tokens=[1, 2, 3]")
    prompts.room(max(config.prompt_tokens), model)
    formed(config, model, worded_by(config, train))


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, train = sizes.model("model"), sizes.data["train"]
    more = sizes.data.get("unlabeled", Amount(0, 0))
    rounds, many = config.rounds if more.records else 0, len(config.prompt_tokens)
    both = Amount(train.records + int(config.share * more.records), train.tokens + int(config.share * more.tokens))
    longest = max(config.prompt_tokens, default=0)
    each = [many * a.tokens + many * longest * a.records for a in (train, both, more)]
    numbers = many * facts.width * (longest + config.dimension)
    share = min(1.0, numbers / max(facts.parameters, 1))
    first, again = (
        training(config, facts, a._replace(tokens=tokens), share=share) for a, tokens in zip((train, both), each)
    )
    return first._replace(
        flops=first.flops + rounds * (again.flops + 2.0 * facts.parameters * each[2]),
        steps=first.steps + rounds * (again.steps + more.records // READ),
        memory=max(first.memory, again.memory if rounds else 0),
        disk=4 * numbers + 10_000,
    )


METHOD = Method(
    paper="arXiv:2302.09236",
    config=Config,
    models={"model": Slot((Gradients, Codec), help="the language model to prompt; its weights stay as they are")},
    data={
        "train": DataSlot(Data.FEW_SHOT, ("label", "pair"), help="a few examples of each class"),
        "unlabeled": DataSlot(
            Data.UNLABELED, ("text", "label", "pair"), optional=True, help="more texts of the same kind"
        ),
        "dev": DataSlot(Data.FEW_SHOT, ("label", "pair"), optional=True, help="held out: for patience"),
    },
    run=run,
    cost=cost,
    agree=agree,
    open=opened,
    forms=("program",),
)
