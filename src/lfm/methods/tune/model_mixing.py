"""Mix what a fine-tuned model answers with what it answered before.

    linear:  p(y | x) = (1 − λ) p_base(y | x) + λ p_tuned(y | x)
    log:     p(y | x) ∝ p_base(y | x)^(1 − λ) · p_tuned(y | x)^λ

Paper: Understanding Finetuning for Factual Knowledge Extraction, arXiv 2301.11293, where fine-tuning makes a model name
the objects of the training set too often and mixing the models is one of two cures (`tune.mixture_ft` is the other, and
they add up). Differs: probabilities are mixed token by token (class by class of a classifier), so that the mixture can
be spoken and scored like any model, not over a list of whole answers. That makes the linear mixture deaf to a base that
gives every answer little, as where it has not met the form of the question; the log-linear one heeds its ranking all
the same, and is the default. λ is `weight`, or of a grid of 41 the one that makes the answers of `dev` most likely.

Models: base and tuned of one task and vocabulary (or classes), each a checkpoint, an adapter or a program with Logits.
Data: `dev`, optional: records that neither was tuned on. The result is a program over the two that stores nothing but
λ, and runs both. Errors: MismatchError where the two do not answer alike.

    lfm run tune.model_mixing base=base tuned=tuned dev=dev.jsonl --out mixed
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import lfm.core
from lfm.core import (
    Codec,
    Cost,
    Data,
    DataSlot,
    Inputs,
    Logits,
    Logprobs,
    Meta,
    Method,
    Model,
    Parts,
    Run,
    Sizes,
    Slot,
    Text,
)
from lfm.core.errors import MismatchError
from lfm.core.heavy import torch
from lfm.data import task as tasks
from lfm.models.language import CausalLogprobs, CausalText, MaskedLogprobs
from lfm.models.program import program
from lfm.train import suited

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch

BATCH = 32
"""Dev records a pass."""


Kind = Literal["log", "linear"]
GRID = 41
"""Shares that are tried on dev records, both ends counted."""


class Config(lfm.core.Config, frozen=True):
    kind: Annotated[Kind, Meta(description="what is averaged: log-probabilities, or probabilities")] = "log"
    weight: Annotated[float, Meta(ge=0, le=1, description="λ, the tuned model's share, where no dev records are")] = 0.5


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    base, tuned = inputs.model("base"), inputs.model("tuned")
    weight = config.weight
    if inputs.records("dev"):
        told = run.step("told", lambda: likelihoods(config.kind, inputs, run))
        weight = shares()[int(told.argmax())]
        run.note(dev_loss=-float(told.max()), dev_loss_base=-float(told[0]), dev_loss_tuned=-float(told[-1]))
    run.note(weight=weight)
    return program(
        "tune.model_mixing", config, Parts({"base": (base,), "tuned": (tuned,)}, {}, {"weight": weight}), open
    )


def shares() -> list[float]:
    """The λ that are tried."""
    return [i / (GRID - 1) for i in range(GRID)]


def likelihoods(kind: Kind, inputs: Inputs, run: Run) -> Tensor:
    """The mean log-probability of the dev records' answers, token by token, under each share's mixture; (GRID,)."""
    base, tuned = inputs.model("base"), inputs.model("tuned")
    codec = base.ask(Codec)
    records = tasks.fit(inputs.records("dev"), codec, base.facts)
    task = tasks.task_for(records, codec, base.facts)
    sums, count = torch.zeros(GRID, dtype=torch.float64), 0
    for start in run.track(range(0, len(records), BATCH), "dev", -(-len(records) // BATCH)):
        batch = task.collate(records[start : start + BATCH])
        (before, labels), (after, _) = (task.scored(m.ask(Logits).logits(batch), batch) for m in (base, tuned))
        for place, share in enumerate(shares()):
            told = mixture(kind, before, after.to(before.device), share).gather(-1, labels[:, None])
            sums[place] += told.double().sum().cpu()
        count += len(labels)
    return sums / max(count, 1)


def mixture(kind: Kind, base: Tensor, tuned: Tensor, weight: float) -> Tensor:
    """Log-probabilities (…, V) of the mixture of two models' logits."""
    before, after = base.float().log_softmax(-1), tuned.float().log_softmax(-1)
    if kind == "log":
        return ((1 - weight) * before + weight * after).log_softmax(-1)
    share = torch.tensor(weight, dtype=torch.float64)
    return torch.logaddexp(before + (1 - share).log().float(), after + share.log().float())


@final
class Mixed:
    """Logits of the mixture: its log-probabilities."""

    def __init__(self, config: Config, parts: Parts) -> None:
        self._config, self._parts = config, parts

    def logits(self, batch: Batch) -> Tensor:
        base, tuned = (self._parts.model(role).ask(Logits).logits(batch) for role in ("base", "tuned"))
        return mixture(self._config.kind, base, tuned.to(base.device), float(self._parts.state["weight"]))


def open(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The interfaces of the mixture."""
    mixed, base = Mixed(config, parts), parts.model("base")
    gives: dict[type, Callable[[], Any]] = {Logits: lambda: mixed, Codec: lambda: base.ask(Codec)}
    match base.facts.task:
        case "causal-lm":
            gives[Logprobs] = lambda: CausalLogprobs(mixed.logits, base.ask(Codec), context=lambda: base.facts.context)
            gives[Text] = lambda: CausalText(mixed.logits, base.ask(Codec))
        case "masked-lm":
            gives[Logprobs] = lambda: MaskedLogprobs(mixed.logits, base.ask(Codec), context=lambda: base.facts.context)
    return gives


def agree(config: Config, inputs: Inputs) -> None:
    suited(config, inputs, role="base")
    base, tuned = inputs.model("base").facts, inputs.model("tuned").facts
    for what, ours, theirs in (
        ("tasks", base.task, tuned.task),
        ("vocabularies", base.vocabulary_digest, tuned.vocabulary_digest),
        ("classes", base.labels, tuned.labels),
    ):
        if ours and theirs and ours != theirs:
            shown = "" if what == "vocabularies" else f"{ours} and {theirs}"
            raise MismatchError(
                f"models of different {what} do not mix", why=shown, fix="give the model that `tuned` was tuned from"
            )


def cost(config: Config, sizes: Sizes) -> Cost:
    models, amount = [sizes.model("base"), sizes.model("tuned")], sizes.data.get("dev")
    records, tokens = amount or (0, 0)
    parameters = sum(model.parameters for model in models)
    return Cost(flops=2.0 * parameters * tokens, steps=2 * -(-records // BATCH), memory=4 * parameters, disk=1024)


METHOD = Method(
    paper="arXiv:2301.11293",
    config=Config,
    models={
        "base": Slot((Logits, Codec), help="the model before fine-tuning"),
        "tuned": Slot((Logits,), help="the model after"),
    },
    data={
        "dev": DataSlot(
            Data.FEW_SHOT,
            ("fact", "completion", "chat", "label", "pair", "text", "image", "audio"),
            optional=True,
            help="records of the task that it was not tuned on, to choose λ by",
        )
    },
    forms=("program",),
    run=run,
    cost=cost,
    agree=agree,
    open=open,
)
