"""Mend a model by neurons beside one feed-forward layer: one for each mistake, or a few that all facts share.

    y = FFN(x) + Σ_j act(k_j · x + b_j) v_j
    t-patcher, each edit by itself: −log p(new object) + a S(−s) + m (S(M k + b + γ) + S(M k + b − s + γ))
    calinet, all edits together: −log p(new objects)

s is what goes into act at the mistake, M what the layer reads elsewhere, S(z) = log(1 + mean of the 1000 largest eᶻ).

Papers: Transformer-Patcher, arXiv 2301.09785: a neuron for each token that the model does not say, in the last layer;
CaliNET, arXiv 2210.03329: `slots` neurons without biases. What differs: S is the logarithm of the paper's (plus 1), so
that no loss runs away; M is running text, the rest of the prompt, and the prompt with 32 other subjects, less what text
says of the fact itself (what lies nearer than any other subject); earlier edits are no part of it, so that order says
nothing, and a forgotten edit leaves the others as they are, bit for bit; a key begins as the support vector that tells
the mistake from M (the paper: at x), γ is where act has died away (3 for GELU, as in the paper), rates are in units of
the layer's.

Model: a causal, masked or encoder-decoder language model; the last two need `text`. A mistake is a token that a causal
model or a decoder says, or a blank; in an encoder, which says nothing, an edit has one neuron, at its subject's last
token. The result is a program, which stores a key, a bias and a value for each neuron; with
`--format checkpoint` a plain model whose feed-forward layers are that much wider (by zeros in the other blocks), where
its architecture has biases there, or a setting for them.
`memory=` adds to an earlier one; with `forget=true` the edits go out of it. Notes are of greedy text. Errors: EditError
for an edit that does not hold (refused or, with on_failure=skip, left out), and where other text suffers; DataError.

    lfm run edit.t_patcher model=base edits=edits.jsonl --out patched
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec.structs import replace

from lfm.core import Cost, Gradients, Inputs, Kept, Meta, Method, Model, Parts, Run, Sizes, Weights
from lfm.core.errors import EditError, SlotError
from lfm.core.heavy import torch
from lfm.editing import neuron_search, neurons, outcome, recall, remembering, settled, wider
from lfm.editing.neurons import Neurons
from lfm.models import structure
from lfm.models.program import program

if TYPE_CHECKING:
    from lfm.data.records import Edit
    from lfm.editing.setting import Setting

ID = "edit.t_patcher"
FIX = "another layer, more text, a larger quiet, or fewer steps"


class Config(outcome.Trained, frozen=True):
    variant: Annotated[
        Literal["t-patcher", "calinet"], Meta(description="neurons of each edit's own, or shared by all")
    ] = "t-patcher"
    layer: Annotated[int | None, Meta(description="block to edit, from 0; none: the last")] = None
    slots: Annotated[int, Meta(ge=1, description="calinet: neurons that all edits share")] = 64
    activation: Annotated[float, Meta(ge=0, description="a: weight of firing at the mistake")] = 1.0
    quiet: Annotated[float, Meta(ge=0, description="m: weight of not firing elsewhere")] = 5.0
    accept: Annotated[float, Meta(gt=0, lt=1, description="least p(new object) that a neuron must reach")] = 0.5
    tokens: Annotated[int, Meta(ge=1, description="tokens of text at which no neuron must fire")] = 4096
    prefixes: Annotated[int, Meta(ge=0, description="calinet: texts of its own before a prompt, to train on")] = 4
    forget: remembering.Forget = False
    steps: Annotated[int, Meta(ge=0, description="steps of Adam; 0: 100, for calinet 200")] = 0
    lr: Annotated[float, Meta(gt=0, description="Adam's rate in units of what the layer reads and writes")] = 0.05
    warmup: Annotated[float, Meta(ge=0, lt=1, description="share of the steps in which the rate rises")] = 0.0
    clip: Annotated[float, Meta(ge=0, description="largest norm of the gradient; 0: any, each edit by itself")] = 0.0


KIND = settled.Kind(Neurons, neurons.empty, neurons.learn, neurons.forget, neurons.attach)


def run(given: Config, inputs: Inputs, run: Run) -> Model:
    config, model = replace(given, steps=_steps(given)), inputs.model("model")
    for each in inputs.all("memory"):
        neurons.taken(each.ask(Neurons), ())  # refuses, before any work, neurons that edits share
    here, kept, edits = remembering.begun(
        inputs,
        run,
        KIND,
        lambda *_: -1 if config.layer is None else config.layer,
        prefixes=config.prefixes if config.variant == "calinet" else 0,
        tokens=config.tokens,
        forget=config.forget,
    )
    failures: list[EditError] = []
    if edits and config.variant == "t-patcher":
        kept = neurons.learn(kept, found(config, here, kept, edits, failures, run))
    elif edits:
        kept = calibrated(config, here, kept, edits, failures, run)
    kept = settled.settled(here, kept, edits, failures, config, run, KIND, fix=FIX)
    run.note(neurons=len(kept.keys))
    weights = model.ask(Weights)
    made = program(ID, given, kept.parts(model), open)

    def widened(out: Path) -> Model:
        return wider.wider(weights, model.ask(Gradients), kept).save(out, "checkpoint")

    return dataclasses.replace(made, formats={**made.formats, "checkpoint": widened}, _opened={})


def _steps(config: Config) -> int:
    return config.steps or (200 if config.variant == "calinet" else 100)


def found(
    config: Config, here: Setting, kept: Neurons, edits: Sequence[Edit], failures: list[EditError], run: Run
) -> Neurons:
    """Each edit's neurons, found by itself; those that do not make it be said become failures."""
    text = torch.cat(recall.read(here, "ffn_in", kept.block, here.text))
    act = structure.activation(here.module, structure.all_blocks(here.module)[kept.block])
    losses = neuron_search.Losses(config.activation, config.quiet, neuron_search.quiet(act))
    for start in run.track(range(0, len(edits), recall.GROUP), "neurons"):
        group = edits[start : start + recall.GROUP]
        name = f"neurons {start}"
        search = partial(neuron_search.search, here, kept.block, group, text, losses, config, run, f"train {name}")
        made = run.step(name, search)
        told, by = made.pop("probability"), "its neurons give"
        good = recall.likely(group, told, config.accept, kept.block, by, failures, run)
        more = Neurons(kept.base, kept.block, tuple(group), **made)
        kept = neurons.learn(kept, neurons.taken(more, good))
    return kept


def calibrated(
    config: Config, here: Setting, kept: Neurons, edits: Sequence[Edit], failures: list[EditError], run: Run
) -> Neurons:
    """Slots that all edits share; where some are not said then, and may be left out, others for the rest."""
    going = list(edits)
    while going:
        name = f"slots for {len(going)}"
        train = partial(neuron_search.calibrated, here, kept.block, going, config.slots, config.quiet, config, run)
        made = run.step(name, partial(train, f"train {name}"))
        owner = torch.full((config.slots,), neurons.SHARED)
        kept = Neurons(kept.base, kept.block, tuple(going), owner, **made)
        off = neurons.attach(here.module, kept)
        said = here.says(outcome.wanted(going))
        off()
        if all(said):
            return kept
        why = f"{config.slots} slots, trained on all edits, do not make it be said"
        failures += [recall.failure(edit, kept.block, why) for edit, ok in zip(going, said, strict=True) if not ok]
        if config.on_failure == "refuse":
            break
        going = [edit for edit, ok in zip(going, said, strict=True) if ok]
    raise failures[0]


def open(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The interfaces of the program: those of the model with the neurons, and the neurons themselves."""
    return remembering.interfaces(parts, neurons.opened(parts), neurons.attach)


def agree(config: Config, inputs: Inputs) -> None:
    remembering.agree(ID, inputs, config.layer, forget=config.forget)
    if inputs.all("memory") and config.variant == "calinet":
        raise SlotError("calinet's slots are shared by all edits", fix="give all edits at once, without memory")


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, edits = sizes.model("model"), sizes.data["edits"]
    prompt = 8 + edits.tokens // max(1, edits.records)
    layers = facts.layers or 1
    tail = 2.0 * facts.parameters / layers + 2.0 * facts.width * facts.vocabulary
    many = edits.records * (config.prefixes + 1 if config.variant == "calinet" else 1)
    beside = 6.0 * facts.width * config.tokens
    return Cost(
        flops=_steps(config) * many * (3 * prompt * tail + beside) + 5.0 * facts.parameters * config.tokens,
        steps=-(-edits.records // recall.GROUP) * _steps(config),
        memory=4 * facts.parameters + 12 * prompt * recall.GROUP * facts.vocabulary + 8 * facts.width * config.tokens,
        disk=8 * facts.width * (config.slots if config.variant == "calinet" else edits.records),
    )


METHOD = Method(
    paper="arXiv:2301.09785",
    config=Config,
    models=remembering.models(ID, Neurons, Weights),
    data=remembering.DATA,
    run=run,
    cost=cost,
    agree=agree,
    open=open,
    forms=("program", "checkpoint"),
    kept=Kept(Neurons, neurons.learn, neurons.taken, keys=attrgetter("keys")),
)
