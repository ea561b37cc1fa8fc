"""Change facts without touching the model: before what asks about them go the new fact and examples of how it is used.

    New Fact: {prompt} {new object}        k examples, in three kinds:  copy     the new fact itself, then its object
    Prompt: {what is asked}                                             update   it said otherwise, then its new object
                                                                        retain   another fact, then what it always was

Paper: Can We Edit Factual Knowledge by In-Context Learning? (IKE), arXiv 2305.12740. Examples are of other facts, copy,
update and retain as 1 : 3 : 4, those most like what is asked, the most alike last. Likeness is the cosine of the mean
of a `retriever`'s last hidden states, or, where none is given, of words, each weighed by how few examples have it.
What differs: the new fact goes only before a prompt that names its subject (`scope=subject`), so that every other
prompt reaches the model as it is; of a subject's several facts the one most like the prompt is told. With `scope=all`
the most alike fact goes before every prompt, as in the paper. An edit that the model then does not say is refused, or
skipped and told of: a model too small to learn from examples (the zoo's) refuses them all.

Model: one that gives text and tells probabilities, an endpoint too; its weights stay as they are, so nothing else can
break. Data: edits; `demonstrations` are other edits to make examples of, the edits themselves where there are none (an
edit is never its own example). The result is a program over the model: what is asked through it grows by k examples.
Errors: EditError; DataError for contradicting edits, or prompts that the examples make too long for the model.

    lfm run edit.ike model=model edits=edits.jsonl demonstrations=others.jsonl --set k=2 --out told
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import lfm.core
from lfm.core import (
    Codec,
    Cost,
    Data,
    DataSlot,
    Features,
    Inputs,
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
from lfm.core.errors import EditError
from lfm.core.heavy import torch
from lfm.data.wording import spaced
from lfm.editing import outcome, rows
from lfm.models.program import program
from lfm.retrieval.demonstrations import Contexts, ToldLogprobs, ToldText, embeddings, examples_of, fact_of

if TYPE_CHECKING:
    from lfm.data.records import Edit

ID = "edit.ike"


class Config(lfm.core.Config, frozen=True):
    k: Annotated[int, Meta(ge=0, description="examples before a prompt")] = 16
    scope: Annotated[
        Literal["subject", "all"],
        Meta(description="prompts that name an edit's subject, or all prompts, are told of it"),
    ] = "subject"
    on_failure: Annotated[
        outcome.OnFailure, Meta(description="an edit that fails ends the run, or is left out and told of")
    ] = "refuse"


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model, edits = inputs.model("model"), list(inputs.records("edits"))
    others = list(inputs.records("demonstrations")) or edits
    models = {role: inputs.all(role) for role in ("model", "retriever") if inputs.all(role)}
    examples = [example for edit in others for example in examples_of(edit)]

    facts = [[edit.subject, fact_of(edit)] for edit in edits]
    vectors = run.step("embeddings", lambda: embeddings(inputs.all("retriever"), facts, examples))

    def contexts_of(kept: Sequence[int]) -> Contexts:
        tensors = {name: held[list(kept)] if name == "facts" else held for name, held in vectors.items()}
        state = {"facts": [facts[i] for i in kept], "examples": [list(example) for example in examples]}
        return before(config, Parts(models, tensors, state))

    around = run.step("before", lambda: outcome.around(outcome.saying(model.ask(Text)), edits))
    told = run.step("said", lambda: outcome.saying(ToldText(contexts_of(range(len(edits)))))(outcome.wanted(edits)))
    made = [edit for edit, right in zip(edits, told, strict=True) if right]
    failures = [edit for edit, right in zip(edits, told, strict=True) if not right]
    if failures and (config.on_failure == "refuse" or not made):
        raise EditError(
            f"{len(failures)} of {len(edits)} edits were not said: {unsaid(failures[0])}",
            why="the model does not follow the examples that go before the prompt",
            fix="more or other demonstrations, a larger model, or on_failure=skip",
        )
    contexts = contexts_of([i for i, right in enumerate(told) if right])
    scores = ToldLogprobs(contexts).score([e.prompt for e in made], [spaced(e.prompt, e.new_object) for e in made])
    run.note(
        edits=len(made),
        skipped=len(failures),
        **({"skipped_because": "; ".join(map(unsaid, failures))} if failures else {}),
        examples=len(examples),
        probability=float(torch.tensor([score.total for score in scores]).exp().mean()),
        **run.step("measured", lambda: outcome.measured(outcome.saying(ToldText(contexts)), made, edits, around)),
    )
    return program(ID, config, contexts.parts, opened)


def unsaid(edit: Edit) -> str:
    return f"{edit.prompt!r} did not go on with {edit.new_object!r}"


def before(config: Config, parts: Parts) -> Contexts:
    return Contexts(parts, config.k, everywhere=config.scope == "all")


def opened(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The interfaces of the program."""
    contexts = before(config, parts)
    return {Text: lambda: ToldText(contexts), Logprobs: lambda: ToldLogprobs(contexts)}


def agree(config: Config, inputs: Inputs) -> None:
    rows.agree(inputs.records("edits"))


def cost(config: Config, sizes: Sizes) -> Cost:
    edits, facts = sizes.data["edits"], sizes.model("model")
    each = edits.tokens / max(1, edits.records)
    asked = (
        edits.records * 12
    )  # the edit twice, its score, paraphrases and neighbours, not counted before they are read
    read = asked * each * (2 * config.k + 2)
    return Cost(
        flops=2.0 * facts.parameters * read,
        steps=asked * 8,
        memory=4 * facts.parameters,
        disk=int(100 * (edits.records + config.k)),
        queries=asked,
        tokens=int(read + 8 * asked),
    )


METHOD = Method(
    paper="arXiv:2305.12740",
    config=Config,
    models={
        "model": Slot((Text, Logprobs), help="the language model to tell; an endpoint will do"),
        "retriever": Slot((Features, Codec), min=0, help="a model whose hidden states tell which texts are alike"),
    },
    data={
        "edits": DataSlot(Data.FEW_SHOT, ("edit",), help="facts to change"),
        "demonstrations": DataSlot(Data.FEW_SHOT, ("edit",), optional=True, help="other edits, to make examples of"),
    },
    run=run,
    cost=cost,
    agree=agree,
    open=opened,
    forms=("program",),
)
