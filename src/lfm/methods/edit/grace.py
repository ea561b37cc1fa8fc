"""Keep edits in a memory beside the weights: near an edit's key, one layer's output is replaced by the edit's value.

    h(x) = v_i   if ‖k(x) − k_i‖ ≤ ε_i for the nearest key k_i,   W k(x) + b otherwise
    v_i = argmin_v −log p(new object | prompt, h = v at the prompt's last token)

Paper: GRACE, arXiv 2211.11031. k(x) is what the projection ending a block's feed-forward layer reads. ε begins at one
radius; edits that agree expand, edits that conflict split the distance between them. What differs: the radius is no
constant (the paper's 1 says nothing in another model) but `radius` × the distance to the nearest of 32 prompts with
another subject; ε is a function of the set of edits, equal to the paper's for two, so that order says nothing and
forgetting one gives exactly what had been made without it; keys are looked up at every token (the authors': at the
prompt's last, then at each that is made), so that cached, uncached and scored text agree; values begin at W k + b, not
at random. The block is found by trying: the last in which edits have values, and texts before a prompt move its key
less than another subject does.

Model: a causal language model. The result is a program, which stores a key, a value and a radius for each edit.
`memory=` adds to an earlier one; with `forget=true` the edits go out of it. Notes are of greedy text. Errors: EditError
for an edit that does not hold (refused or, with on_failure=skip, left out), and where other text suffers; DataError.

    lfm run edit.grace model=base edits=edits.jsonl --out remembered
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Kept, Meta, Method, Model, Parts, Run, Sizes, Slot
from lfm.core.errors import EditError, MismatchError, SlotError
from lfm.core.heavy import torch
from lfm.editing import memory, outcome, recall, rows, setting, settled
from lfm.editing.choose import candidates
from lfm.editing.memory import Memory
from lfm.models import device, local, structure
from lfm.models.program import program

if TYPE_CHECKING:
    from torch import nn

    from lfm.editing.setting import Setting


class Config(recall.Recall, frozen=True):
    layer: Annotated[int | None, Meta(description="block to edit, from 0; none: try them on the first edits")] = None
    prefixes: Annotated[int, Meta(ge=1, description="texts of its own before a prompt, to try a block")] = 8
    tokens: Annotated[int, Meta(ge=1, description="tokens of text that pieces are taken from")] = 4096
    collapse: Annotated[float, Meta(gt=1, description="most that the memory may multiply perplexity by")] = 1.5
    on_failure: Annotated[
        Literal["refuse", "skip"], Meta(description="an edit that fails ends the run, or is left out and told of")
    ] = "refuse"
    forget: Annotated[bool, Meta(description="take the edits out of the memory, by prompt and new object")] = False


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model, edits = inputs.model("model"), [] if config.forget else list(inputs.records("edits"))
    before = settled.earlier(model, inputs.all("memory"), Memory)
    here = setting.opened(model, inputs.records("text"), run, prefixes=config.prefixes, tokens=config.tokens)
    block = before.block if before else config.layer
    block = recall.chosen(config, here, edits, run) if block is None else block % len(structure.blocks(here.module))
    kept = before or _empty(here, model.digest, block)
    if config.forget:
        kept = memory.forget(kept, *inputs.records("edits"))
    failures: list[EditError] = []
    if edits:
        kept = memory.learn(kept, recall.found(config, here, kept, edits, failures, run))
    kept = settled.settled(
        here,
        kept,
        edits,
        failures,
        outcome.Held(collapse=config.collapse, on_failure=config.on_failure),
        run,
        attach=memory.attach,
        forget=memory.forget,
        fix="a smaller radius, or another layer",
    )
    return program("edit.grace", config, kept.parts(model), open)


def _empty(here: Setting, base: str, block: int) -> Memory:
    shape = structure.feed_forward(here.module, structure.blocks(here.module)[block])
    return Memory(base, block, (), torch.zeros(0, shape.inner), torch.zeros(0, shape.width), torch.zeros(0))


def open(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The interfaces of the program: those of the model, answering by the memory, and the memory itself."""
    model, kept = parts.model("model"), memory.opened(parts)

    def built() -> nn.Module:
        module = model.ask(Gradients).module().to(device())
        memory.attach(module, kept)
        return module

    gives = dict(local.interfaces(model.facts.task, built, lambda: model.ask(Codec)))
    return gives | {Codec: lambda: model.ask(Codec), Memory: lambda: kept}


def agree(config: Config, inputs: Inputs) -> None:
    edits, given = inputs.records("edits"), inputs.all("memory")
    rows.agree(edits)
    if config.forget and not given:
        raise SlotError("edit.grace has nothing to forget from", fix="add memory=REF")
    if given and config.layer is not None:
        raise SlotError("edit.grace takes either memory or layer", why="the memory's edits are of one block")
    facts = inputs.model("model").facts
    if facts.task != "causal-lm":
        raise MismatchError(
            f"edit.grace edits causal language models; {inputs.model('model').ref} is none",
            why=f"its task is {facts.task or 'not known'}",
            fix="give a causal language model, or change the facts by tune.lora",
        )
    if config.layer is not None and facts.layers and not -facts.layers <= config.layer < facts.layers:
        raise MismatchError(f"there is no block {config.layer}", why=f"the model has {facts.layers}, counted from 0")


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, edits = sizes.model("model"), sizes.data["edits"]
    tried = len(candidates(facts.layers + 1)) if config.layer is None and facts.layers else 0
    prompt = 8 + edits.tokens // max(1, edits.records)
    searches = edits.records + tried * min(recall.TRIED, edits.records)
    a_prompt = 2.0 * facts.parameters * prompt
    return Cost(
        flops=searches * a_prompt * (3 * config.steps + recall.RIVALS) + 2.5 * facts.parameters * config.tokens,
        steps=(-(-edits.records // recall.GROUP) + tried) * 2 * config.steps,
        memory=4 * facts.parameters + 24 * prompt * max(recall.GROUP, recall.RIVALS) * facts.vocabulary,
        disk=20 * facts.width * edits.records,
    )


METHOD = Method(
    paper="arXiv:2211.11031",
    config=Config,
    models={
        "model": Slot((Gradients, Codec), help="the causal language model to edit"),
        "memory": Slot((Memory,), min=0, help="what edit.grace made of it before, to add to or to forget from"),
    },
    data={
        "edits": DataSlot(Data.FEW_SHOT, ("edit",), help="facts to change, or to forget"),
        "text": DataSlot(Data.UNLABELED, ("text",), optional=True, help="running text: other subjects, perplexity"),
    },
    run=run,
    cost=cost,
    agree=agree,
    open=open,
    forms=("program",),
    kept=Kept(Memory, memory.learn, memory.taken, keys=attrgetter("keys")),
)
