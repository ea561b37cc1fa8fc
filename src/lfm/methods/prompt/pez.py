"""Find a prompt of real words by gradients: text that can be read, and be given to any model.

    P' = nearest(P) row by row, by cosine among the words' embeddings;   P ← AdamW(P, ∂L([E(s); P'; E(x)]) / ∂P')

Paper: PEZ, Hard Prompts Made Easy, arXiv 2302.03668, and its code (YuxinWenRick/hard-prompts-made-easy: the gradient is
taken at the projection and given to the continuous copy; AdamW, rate and decay .1; the best prompt seen is kept). s are
the special tokens that open a text. Differs: only tokens that are words when written alone are candidates; the best is
that of the least loss on `dev`, or else on `train`, looked at after each epoch, not step; gradients are clipped.

Models: model, of text, with Gradients and a codec; target, optional: a model of Text or Logprobs (an endpoint will do)
that the prompt is for. Data: records as the task they set, of kinds that models of language read. The result is a
program: without a target it puts the found tokens before the input of `model`, exactly; with one it writes the prompt
and a space before whatever the target is asked (of what is longer than a model here reads, the words go first). The
prompt stands in run.json ("prompt"), and whether the tokenizer reads that text as the very tokens that were found
("respelled"); where it does not, a model that is given the text reads other tokens. Errors: MismatchError for a
decoder's classification head; ConfigError where the prompt fills the context; DataError for records that set no task;
DivergedError.

    lfm run prompt.pez model=base train=facts.jsonl --set prompt_tokens=4 --set steps=60 --out found
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from lfm.core import Codec, Cost, Gradients, Inputs, Meta, Method, Model, Parts, Run, Sizes, Slot
from lfm.core.heavy import torch
from lfm.core.interfaces import Logprobs, Text
from lfm.models import prefixed, virtual
from lfm.models.program import program
from lfm.train import taught
from lfm.train.setting import steps_of
from lfm.tuners import prompts

if TYPE_CHECKING:
    from torch import nn

ID = "prompt.pez"


class Config(prompts.Prompting, frozen=True):
    prompt_tokens: Annotated[int, Meta(ge=1, description="words of the prompt")] = 16
    steps: Annotated[int, Meta(ge=0, description="optimizer steps; 0: as many as `epochs` asks")] = 3000
    lr: Annotated[float, Meta(gt=0, description="peak learning rate (AdamW)")] = 0.1
    weight_decay: Annotated[float, Meta(ge=0, description="decoupled weight decay, of matrices only")] = 0.1
    schedule: Annotated[
        Literal["cosine", "linear", "constant"], Meta(description="how the rate falls to 0 after the warm-up")
    ] = "constant"
    warmup: Annotated[float, Meta(ge=0, lt=1, description="share of the steps in which the rate rises")] = 0.0


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    from lfm.models import woven
    from lfm.tuners.weaves import Spelled, leading, readable

    model, train = inputs.model("model"), inputs.records("train")
    within = prompts.roomy(model, config.prompt_tokens)
    base, tokenizer = model.ask(Gradients).module(), model.ask(Codec).tokenizer
    words = torch.tensor(readable(tokenizer))
    table = _rows(base, words)
    begin = table[torch.randint(len(table), (config.prompt_tokens,), generator=run.generator("words"))]
    weave = Spelled(begin, words, table, leading(tokenizer))
    module = woven.Weaving(base, weave)
    prompts.tried(module, within, train)
    chosen = msgspec.structs.replace(config, patience=config.patience or steps_of(config, len(train)))
    taught(module, within, train, chosen, run, dev=inputs.records("dev") or train)
    ids = weave.ids()
    text = tokenizer.decode(ids)
    respelled = list(tokenizer(text, add_special_tokens=False)["input_ids"]) == ids
    run.note(prompt=text, respelled=str(respelled).lower())
    if targets := inputs.all("target"):
        state: dict[str, Any] = {"prompt": f"{text.rstrip()} "}
        return program(ID, config, Parts({"model": targets[:1]}, {}, state), open)
    facts = {"context": virtual.shortened(model.facts, len(ids)).context}
    state = {"prompt": text, "ids": ids, "leading": sorted(leading(tokenizer)), "facts": facts}
    return program(ID, config, Parts({"model": (model,)}, {}, state), open)


def _rows(base: nn.Module, ids: Any) -> Any:
    embed: Any = base.get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        return embed(ids.to(embed.weight.device)).float()


def open(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The model with the prompt's tokens before its input; a target with its text."""
    from lfm.models import woven

    model, state = parts.model("model"), parts.state
    if "ids" not in state:
        return prefixed.interfaces(model, state["prompt"])

    def weave(base: Any) -> nn.Module:
        from lfm.tuners.weaves import Said

        return Said(_rows(base, torch.tensor(state["ids"])), frozenset(state["leading"]))

    return woven.interfaces(model, weave)


def cost(config: Config, sizes: Sizes) -> Cost:
    whole = prompts.cost_of(config, sizes, config.prompt_tokens * sizes.model("model").width)
    return whole._replace(flops=4 / 3 * whole.flops, disk=10_000)  # each epoch ends with a look at its records


METHOD = Method(
    paper="arXiv:2302.03668",
    config=Config,
    models={
        **prompts.MODEL,
        "target": Slot((), any_of=(Text, Logprobs), min=0, help="a model of text that the prompt is for"),
    },
    data=prompts.RECORDS,
    forms=("program",),
    agree=prompts.agree,
    run=run,
    cost=cost,
    open=open,
)
