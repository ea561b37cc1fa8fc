"""Mend a text classifier by patches in words, “if the review says …, then …”, each of which acts where it applies.

    p(y | x) = g(c, x) · I(y | q, x) + (1 − g(c, x)) · f(y | x)      of the patch (if c, then q) with the largest gate g

Paper: Fixing Model Bugs with Natural Language Patches, arXiv 2211.03318. A patch that names a class (then the label is
bad) is an override: I is that class. Any other consequence is to be read with the text (then it was a good day). Gate
and interpreter are trained once, on lessons made of labelled texts (`train`; no patch is seen): whether a condition
holds, a third of the time about words that are none; and what f says of a text with the consequence in place of a
sentence of such words, which the interpreter is to say of the text as it is and the consequence after it.

What differs: nothing is loaded from elsewhere. The paper's T5 reads condition and text together; here the gate compares
tokens, and pairs of tokens, by the model's own input embeddings: it finds what is *said*, hardly what is meant, and
costs no forward pass. The interpreter is the model with a trained change of low rank. Where no gate is above `opens`
(the paper: 0) the logits are the model's, bit for bit.

Model: a text classifier. Data: patches are texts, one each, which a .txt file holds line by line. `memory=` adds
patches to earlier ones, and nothing is trained; `forget=true` takes them out: what is left is what had been made
without them. `examples` are labelled texts that the patches should mend. Accuracies noted are of a fifth of `train`,
held out. Errors: DataError, with file and line, for what is no patch; EditError where the gate cannot tell, the
examples come out wrong, or other texts suffer.

    lfm run edit.patches model=base patches=patches.txt train=train.jsonl --set keep=0 --set accept=0 \\
      --set steps=50 --set read_steps=20 --out patched
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Logits, Method, Model, Parts, Run, Sizes, Slot
from lfm.core.config import Meta
from lfm.core.errors import DataError, EditError, MismatchError, SlotError
from lfm.data import heads
from lfm.editing import patching, settled
from lfm.editing.judging import accuracy, met, trained
from lfm.editing.patching import Patched, Patches
from lfm.models.program import program
from lfm.train import Fit

ID = "edit.patches"
LEAST = 4
"""Labelled texts to practise on."""


class Config(Fit, frozen=True):
    width: Annotated[int, Meta(ge=1, description="of what the gate compares")] = 64
    rank: Annotated[int, Meta(ge=1, description="of the interpreter's change")] = 32
    opens: Annotated[float, Meta(ge=0, lt=1, description="gate above which a patch acts; 0, the paper's: always")] = 0.5
    accept: Annotated[float, Meta(ge=0, le=1, description="least share of held-out lessons and of examples right")] = (
        0.7
    )
    keep: Annotated[float, Meta(ge=0, le=1, description="least share of the accuracy on `train` to keep")] = 0.8
    forget: Annotated[bool, Meta(description="take the patches out of the memory")] = False
    steps: Annotated[int, Meta(ge=1, description="steps of training the gate")] = 500
    read_steps: Annotated[int, Meta(ge=0, description="of the interpreter; 0: none, patches must name a class")] = 150
    read_lr: Annotated[float, Meta(gt=0, description="AdamW's rate for the interpreter")] = 3e-3
    batch_size: Annotated[int, Meta(ge=1, description="lessons a batch; half as many for the interpreter")] = 32
    lr: Annotated[float, Meta(gt=0, description="AdamW's rate for the gate")] = 1e-2
    weight_decay: Annotated[float, Meta(ge=0, description="decoupled weight decay")] = 0.0
    schedule: Annotated[
        Literal["cosine", "linear", "constant"], Meta(description="how the rate falls after the warm-up")
    ] = "linear"


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    patches = patching.parsed(inputs.records("patches"), model.facts)
    patching.fitting(model, patches)
    before = settled.earlier(model, inputs.all("memory"), Patches)
    texts = list(inputs.records("train"))
    held, known = texts[4::5], [text for i, text in enumerate(texts) if i % 5 != 4]
    empty = before or trained(
        model,
        known,
        held if len(held) > 1 else known,
        run,
        width=config.width,
        rank=config.rank,
        gate=config,
        interpreter=msgspec.structs.replace(
            config, steps=config.read_steps, lr=config.read_lr, batch_size=max(1, config.batch_size // 2)
        ),
        accept=config.accept,
    )
    kept = patching.forget(empty, patches) if config.forget else patching.learn(empty, patches)
    patched, plain = Patched(model, kept, config.opens), Patched(model, replace(kept, patches=()), config.opens)
    found: dict[str, float] = {}
    for name, records in (("held_out", held), ("examples", inputs.records("examples"))):
        if records:
            found[f"{name}_before"] = accuracy(model, plain.logits, records)
            found[f"{name}_after"] = accuracy(model, patched.logits, records)
            found[f"{name}_patched"] = met(model, patched, records)
    refuse(config, found)
    run.note(patches=len(kept.patches), **found)
    return program(ID, config, kept.parts(model), open)


def refuse(config: Config, found: Mapping[str, float]) -> None:
    """Raises where the examples do not come out right, or the other texts no longer do."""
    said = found.get("examples_after")
    if said is not None and said < config.accept and not config.forget:
        raise EditError(
            f"{said:.2f} of the examples come out right, {found['examples_before']:.2f} before",
            why=f"accept is {config.accept:g}; a patch acts on {found['examples_patched']:.2f} of them",
            fix="say conditions in the words of the texts, train longer, or lower accept",
        )
    first, after = found.get("held_out_before", 0.0), found.get("held_out_after", 0.0)
    if after < config.keep * first:
        raise EditError(
            f"the patches take accuracy on other texts from {first:.2f} to {after:.2f}",
            why=f"keep is {config.keep:g}; a patch acts on {found['held_out_patched']:.2f} of them",
            fix="narrower conditions, more steps, or a lower keep where those texts are labelled wrong",
        )


def open(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The interfaces of the program: logits by its patches, its codec, and the patches themselves."""
    model, kept = parts.model("model"), patching.opened(parts)
    patched = Patched(model, kept, config.opens)
    return {Logits: lambda: patched, Codec: lambda: model.ask(Codec), Patches: lambda: kept}


def agree(config: Config, inputs: Inputs) -> None:
    model, given, train = inputs.model("model"), inputs.all("memory"), inputs.records("train")
    if model.facts.task != "text-classification":
        raise MismatchError(
            f"{ID} mends text classifiers; {model.ref} is none",
            why=f"its task is {model.facts.task or 'not known'}",
            fix="facts of a language model are edited by edit.rome, edit.serac, …",
        )
    patches = patching.parsed(inputs.records("patches"), model.facts)
    if config.forget and not given:
        raise SlotError(f"{ID} has nothing to forget from", fix="add memory=REF")
    if not given and len(train) < LEAST:
        raise DataError(
            f"{len(train)} labelled texts to practise on",
            why=f"a gate is trained on lessons made of texts: {LEAST} at least",
            fix="add train=FILE with texts and their classes",
        )
    read = next((patch for patch in patches if patch.label < 0), None)
    if read and not config.read_steps and not given:
        raise DataError(
            f"nothing would read the consequence {read.consequence!r}",
            why="read_steps is 0, and it names no class",
            fix="name a class, or let read_steps be more",
        )
    for record in (*train, *inputs.records("examples")):
        heads.class_of(record.label, model.facts)


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, count = sizes.model("model"), sizes.data["patches"].records
    texts = [sizes.data[name] for name in ("train", "examples") if name in sizes.data]
    each = max([32, *(a.tokens // max(1, a.records) for a in texts)])
    trains = not sizes.models.get("memory")
    read = 2.5 * config.read_steps * config.batch_size / 2 * each * trains + 3 * sum(a.tokens for a in texts)
    rows = config.batch_size * each
    return Cost(
        flops=2.0 * facts.parameters * read * 3 + 300.0 * config.steps * rows * facts.width * config.width * trains,
        steps=(config.steps + config.read_steps) * trains,
        memory=int(12 * facts.parameters + 24 * rows * facts.width * max(1, facts.layers)),
        disk=int(4 * facts.width * (8 * facts.layers * config.rank * 2 + 3 * config.width)) + 200 * count,
    )


METHOD = Method(
    paper="arXiv:2211.03318",
    config=Config,
    models={
        "model": Slot((Gradients, Codec), help="the text classifier to mend"),
        "memory": Slot((Patches,), min=0, help="what edit.patches made of it before, to add to or to forget from"),
    },
    data={
        "patches": DataSlot(Data.FEW_SHOT, ("text",), help="if CONDITION, then CONSEQUENCE: one patch each"),
        "train": DataSlot(Data.FEW_SHOT, ("label",), optional=True, help="labelled texts to practise on"),
        "examples": DataSlot(Data.FEW_SHOT, ("label",), optional=True, help="labelled texts that patches should mend"),
    },
    run=run,
    cost=cost,
    agree=agree,
    open=open,
    forms=("program",),
)
