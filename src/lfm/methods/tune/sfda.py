"""Fit a classifier to a new domain from unlabelled records alone, without the data that it was trained on.

    L = E H(p(· | x)) − `diversity` · H(E p(· | x)) + E_kept [`pseudo` · CE(p(· | x), ŷ) + `virtual` · CE(q(· | x), ŷ)]
    q_k ∝ exp(cos(f, w_k) / τ),   f the features that the head's last layer reads, w_k its rows
    ŷ = argmin_k dist(f, c_k),   c_k = Σ p_k(x) f / Σ p_k(x), then once more with the labels found

Papers: SHOT, arXiv 2002.08546: the head (the hypothesis) stays, the body learns to make its answers sure and, over a
batch, all different, and to agree with labels that weighted clustering of the features gives; distances are cosines of
the features with a 1 appended, as in the authors' code. From the survey of data-free transfer, arXiv 2112.15278: labels
are filtered (`keep`, the share of each cluster nearest its centre), and the source is stood for by virtual prototypes,
the head's own rows w, to which features are drawn (τ = `temperature`; `virtual=0`, the default, is SHOT without them).
Differs: AdamW; rounds of relabelling are passes over the records, the rate falling from round to round as SHOT's does,
(1 + 10 · progress)^−¾; no bottleneck or weight normalisation is put into the model.

Models: classifiers of images or texts. Data: `target`, records of the new domain; their classes are not looked at.
Errors: MismatchError for a model that is no classifier or whose head ends in no linear layer; DivergedError.

    lfm run tune.sfda model=base target=images.jsonl --set rounds=3 --out adapted
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import MismatchError
from lfm.core.heavy import F, torch
from lfm.data import task as tasks
from lfm.data.shares import classless
from lfm.data.suited import fitting, worded
from lfm.models import device, forward, layers, structure
from lfm.tensors.clusters import clustered
from lfm.train import Fit, fit, once, training
from lfm.train.losses import entropy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch

READ = 64
"""Records whose features are taken at once."""


class Config(Fit, frozen=True):
    rounds: Annotated[int, Meta(ge=1, description="times that labels are found anew and trained on")] = 15
    diversity: Annotated[float, Meta(ge=0, description="weight of the entropy of a batch's mean answer")] = 1.0
    pseudo: Annotated[float, Meta(ge=0, description="weight of the loss on the labels found")] = 0.3
    keep: Annotated[float, Meta(gt=0, le=1, description="share of each cluster, nearest its centre, that is kept")] = (
        1.0
    )
    virtual: Annotated[float, Meta(ge=0, description="weight of the loss that draws features to the head's rows")] = 0.0
    temperature: Annotated[float, Meta(gt=0, description="τ of that loss")] = 0.1
    epochs: Annotated[float, Meta(gt=0, description="passes over the records in each round, where steps is 0")] = 1.0
    batch_size: Annotated[int, Meta(ge=2, description="records a batch, over which answers are kept diverse")] = 64
    lr: Annotated[float, Meta(gt=0, description="the first round's rate (AdamW)")] = 3e-4
    warmup: Annotated[float, Meta(ge=0, lt=1, description="share of a round's steps in which the rate rises")] = 0.0
    schedule: Annotated[Literal["cosine", "linear", "constant"], Meta(description="how the rate falls in a round")] = (
        "constant"
    )


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    unlabelled = [msgspec.structs.replace(record, label="") for record in inputs.records("target")]
    records = classless(unlabelled, model)
    task = tasks.task_for(records, model.ask(Codec), model.facts)
    numbers, collate = once(records, task.collate)
    module = model.ask(Gradients).module().to(device())
    last = hypothesis(module)
    before: Tensor | None = None
    for place in range(config.rounds):
        told = read(module, last, [collate(numbers[i : i + READ]) for i in range(0, len(numbers), READ)])
        found = clustered(told.features, told.logits.softmax(-1), config.keep)
        before = told.logits if before is None else before
        rated = msgspec.structs.replace(config, lr=config.lr * falling(place / config.rounds))
        fit(module, numbers, labelled(collate, found), loss_of(config, last), rated, run, name=f"round-{place}")
    told = read(module, last, [collate(numbers[i : i + READ]) for i in range(0, len(numbers), READ)])
    assert before is not None
    changed = float((before.argmax(-1) != told.logits.argmax(-1)).double().mean())
    run.note(entropy_before=float(entropy(before)), entropy_after=float(entropy(told.logits)), changed=changed)
    return model.ask(Gradients).rewrap(module.requires_grad_(True))


def falling(progress: float) -> float:
    """The factor on a round's rate; progress: the share of the rounds that are done."""
    return (1 + 10 * progress) ** -0.75


class Told(NamedTuple):
    """features (n, d) that the head's last layer reads; logits (n, K)."""

    features: Tensor
    logits: Tensor


def hypothesis(module: nn.Module) -> nn.Module:
    """The last linear layer of the head, the head frozen and all else to be trained."""
    last: nn.Module | None = None
    module.requires_grad_(True)
    for name in layers.heads(module):
        head = module.get_submodule(name).requires_grad_(False)
        last = ([child for _, child, *_ in structure.linears(head)] or [last])[-1]
    if last is None:
        raise MismatchError("this classifier's head ends in no linear layer", fix="give one whose head does")
    return last


def told_by(module: nn.Module, last: nn.Module, batch: Batch) -> Told:
    """A forward pass with what its last layer reads."""
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        logits = forward(module, batch)
    finally:
        handle.remove()
    return Told(seen[0].float(), logits)


def read(module: nn.Module, last: nn.Module, batches: Sequence[Batch]) -> Told:
    """All records' features and logits, on the CPU."""
    module.eval()
    with torch.no_grad():
        parts = [told_by(module, last, batch) for batch in batches]
    return Told(*(torch.cat(column).cpu() for column in zip(*parts)))


def labelled(collate: Callable[[Sequence[int]], Batch], found: Tensor) -> Callable[[Sequence[int]], Batch]:
    """The batches with the labels found in place of their own."""
    return lambda chosen: {**collate(chosen), "labels": found[list(chosen)]}


def loss_of(config: Config, last: nn.Module) -> Callable[[nn.Module, Batch], Tensor]:
    """L of a batch."""

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        told = told_by(module, last, batch)
        value = entropy(told.logits, config.diversity)
        kept = batch["labels"] >= 0
        if not bool(kept.any()):
            return value
        labels = batch["labels"][kept]
        if config.pseudo:
            value = value + config.pseudo * F.cross_entropy(told.logits[kept], labels)
        if config.virtual:
            rows = F.normalize(last.weight.float(), dim=1)  # type: ignore[operator,union-attr,arg-type]
            near = F.normalize(told.features[kept], dim=1) @ rows.T
            value = value + config.virtual * F.cross_entropy(near / config.temperature, labels)
        return value

    return loss


def agree(config: Config, inputs: Inputs) -> None:
    model = inputs.model("model")
    if model.facts.task not in ("image-classification", "audio-classification", "text-classification"):
        raise MismatchError(
            "tune.sfda adapts classifiers",
            why=f"{model.ref} is {model.facts.task or 'of no known task'}",
            fix="give a classifier of images, sounds or texts",
        )
    target = inputs.records("target")
    tasks.suits(target, model.facts)
    worded(target)
    fitting(target, model, model.facts._replace(labels=()))  # whatever classes they say are not read


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, amount = sizes.model("model"), sizes.data["target"]
    once_ = training(config, facts, amount)
    return once_._replace(
        flops=config.rounds * (once_.flops + 2.0 * facts.parameters * amount.tokens), steps=config.rounds * once_.steps
    )


METHOD = Method(
    paper="arXiv:2002.08546",
    config=Config,
    models={"model": Slot((Gradients, Codec), help="the classifier, trained on another domain")},
    data={"target": DataSlot(Data.UNLABELED, ("image", "audio", "label", "pair"), help="records of the new domain")},
    forms=("checkpoint",),
    run=run,
    cost=cost,
    agree=agree,
)
