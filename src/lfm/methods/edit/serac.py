"""Keep edits in words beside the model: what an edit is about is answered by a second model that is told the edit.

    y = counterfactual(edit i, x)   if p_i = exp(−‖f(x) − f(prompt_i)‖²) > ½ for the likeliest i,   base(x) otherwise

Paper: SERAC, arXiv 2206.06520, with the scope classifier that embeds. What differs: nothing is loaded from elsewhere.
f is a trained linear map of the model's own hidden states, their mean over the text at one block; the counterfactual
model is the model itself with a trained change of low rank, and the edit goes before the prompt as a sentence. Both are
trained once, on facts (`practice`: each is given another's object, told, and asked again in other words; those about
subjects of the edits are left out) or, where there are none, on text of the model's own that breaks off. What an edit
is not about are then other facts of its subject, the same fact of others, and text.

Model: a causal or a masked language model or an encoder-decoder; the last two say no text of their own and need
`practice` and `text`. The result is a program that gives text (but of a masked model) and probabilities, routed by the
prompt; one that no edit is about reaches the model as it is. An encoder-decoder's classifier reads in the encoder.
`memory=` adds edits to an earlier one, at one forward pass each, and nothing is trained again; with `forget=true` the
edits go out of it: each is a row of its own, and the others' stay. Notes are of greedy text, or of blanks filled in.
Errors: EditError for an edit that is not said (refused, or with on_failure=skip left out),
and where other text suffers; DataError.

    lfm run edit.serac model=base edits=edits.jsonl practice=facts.jsonl --set steps=60 --set lr=0.01 \\
      --set on_failure=skip --out told
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Annotated, Any, Literal

import msgspec

from lfm.core import Cost, Data, DataSlot, Inputs, Kept, Meta, Method, Model, Parts, Run, Sizes
from lfm.core.errors import EditError, SlotError
from lfm.core.interfaces import Logprobs, Text, Weights
from lfm.data.records import Edit
from lfm.editing import form, lessons, outcome, remembering, rows, scope, setting, settled
from lfm.editing.scope import Routed, Scope
from lfm.editing.telling import beyond, trained
from lfm.models.program import program
from lfm.train.fit import steps_of

ID = "edit.serac"


class Config(outcome.Trained, frozen=True):
    layer: Annotated[int | None, Meta(description="block whose states the classifier reads; none: half way up")] = None
    width: Annotated[int, Meta(ge=1, description="of what the classifier compares")] = 64
    rank: Annotated[int, Meta(ge=1, description="of the second model's change")] = 64
    tokens: Annotated[int, Meta(ge=1, description="tokens of text, beside the facts")] = 8192
    forget: remembering.Forget = False
    steps: Annotated[int, Meta(ge=1, description="steps of training, of either part")] = 400
    batch_size: Annotated[int, Meta(ge=1, description="edits practised at a time")] = 16
    lr: Annotated[float, Meta(gt=0, description="AdamW's rate")] = 3e-3
    schedule: Annotated[
        Literal["cosine", "linear", "constant"], Meta(description="how the rate falls after the warm-up")
    ] = "linear"


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model, edits = inputs.model("model"), list(inputs.records("edits"))
    before = settled.earlier(model, inputs.all("memory"), Scope)
    here = setting.opened(model, inputs.records("text"), run, prefixes=0, tokens=config.tokens)
    empty = before or trained(
        config,
        here,
        model,
        lessons.drawn(here, inputs.records("practice"), edits, run),
        run,
        layer=config.layer,
        width=config.width,
        rank=config.rank,
    )
    failed: list[Edit] = []
    if config.forget:
        kept, made = scope.forget(empty, edits), []
    else:
        seen = scope.means(here.module, here.codec, empty.block, [edit.prompt for edit in edits])
        kept = scope.learn(empty, edits, seen @ empty.map)
        told = Routed(model, kept).says(outcome.wanted(edits))
        made = [edit for edit, said in zip(edits, told, strict=True) if said]
        failed = [edit for edit, said in zip(edits, told, strict=True) if not said]
        if failed and (config.on_failure == "refuse" or not made):
            raise EditError(
                f"{len(failed)} of {len(edits)} edits were not said: {outcome.unsaid(failed[0])}",
                why="the second model, told the edit, does not answer by it",
                fix="more practice, more steps, a larger rank, or on_failure=skip",
            )
        kept = scope.forget(kept, failed) if failed else kept
    routed = Routed(model, kept)
    first, (after, share) = here.perplexity(), beyond(here, routed)
    refused = outcome.collapsed("the memory", first, after, config.collapse, "more practice, or fewer edits")
    if refused:
        raise refused
    says, plain = routed.says, here.says
    run.note(
        edits=len(kept.edits),
        **outcome.skipped([*map(outcome.unsaid, failed)]),
        perplexity_before=first,
        perplexity_after=after,
        text_in_scope=share,
        **(
            run.step("measured", lambda: outcome.measured(says, made, edits, outcome.around(plain, edits)))
            if made
            else {}
        ),
        **({"efficacy_of_all": _share(says(outcome.wanted(kept.edits)))} if kept.edits else {}),
    )
    return program(ID, config, kept.parts(model), open)


def _share(said: Sequence[bool]) -> float:
    return sum(said) / len(said)


def open(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The interfaces of the program: text and probabilities by routing, and the memory."""
    model, kept = parts.model("model"), scope.opened(parts)
    routed = Routed(model, kept)
    gives = {Logprobs: lambda: routed, Scope: lambda: kept}
    return gives if model.facts.task == form.MASKED_LM else {Text: lambda: routed, **gives}


def agree(config: Config, inputs: Inputs) -> None:
    remembering.agree(ID, inputs, None, forget=config.forget)
    if inputs.all("memory") and inputs.records("practice"):
        raise SlotError(f"{ID} takes either memory or practice", why="what a memory was made with is not trained again")
    form.editable(ID, inputs.model("model"), inputs.records("text"), () if config.layer is None else (config.layer,))
    if not inputs.all("memory"):
        lessons.agree(ID, inputs.model("model").facts.task, inputs.records("practice"), inputs.records("edits"))
    edits = inputs.records("edits")
    told = [msgspec.structs.replace(edit, prompt=scope.statement(edit) + edit.prompt) for edit in edits]
    rows.fit(told, inputs.model("model"), edits)


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, edits = sizes.model("model"), sizes.data["edits"]
    each = max(edits.tokens // max(1, edits.records), 8)
    trains = not sizes.models.get("memory")
    read = 2 * 2 * each * config.batch_size * steps_of(config, 1) * trains
    layers = 7 * max(1, facts.layers)
    return Cost(
        flops=facts.parameters * (6.0 * read + 2.5 * config.tokens + 2.0 * lessons.ENOUGH * 4 * each * trains)
        + 40.0 * facts.parameters * edits.tokens,
        steps=2 * config.steps * trains + 8,
        memory=int(8 * facts.parameters + 48 * config.batch_size * each * facts.vocabulary),
        disk=4 * facts.width * (5 * layers * config.rank + config.width) + 4 * config.width * edits.records,
    )


METHOD = Method(
    paper="arXiv:2206.06520",
    config=Config,
    models=remembering.models(ID, Scope, Weights),
    data=remembering.DATA
    | {"practice": DataSlot(Data.FEW_SHOT, ("fact", "edit"), optional=True, help="facts to practise editing on")},
    run=run,
    cost=cost,
    agree=agree,
    open=open,
    forms=("program",),
    kept=Kept(Scope, scope.joined, scope.taken, keys=attrgetter("keys"), settled=("width", "rank")),
)
