"""Fine-tune all weights; of prompts and completions, on the completions alone.

    θ ← θ − AdamW(∇ −(1/n) Σ log p_θ(yᵢ | x, y_<i)),   the mean over the n scored tokens of a step

Paper: GPT (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training"), whose settings are the
defaults (rate 6.25e-5 falling linearly, 32 records a batch, 3 epochs, 0.2 % warm-up, decay 0.01); instruction tuning is
the same on prompt/completion records, where the prompt is read and not scored, and on conversations in the model's chat
template, where the assistant's turns are (all, or the last). Differs: no auxiliary language-modelling
loss beside a classifier's; fp32 weights. With `pack`, records share rows of so many tokens, each with positions of its
own and blind to the others: the loss is that of the records apart, in fewer and fuller rows (batch_size counts rows).
Before it trains, two records are tried together and apart.

Models: any with Gradients and a codec (packing: causal). Data: every record kind, as its task; dev: held-out records
for `patience`. The result is a checkpoint of the model's own form. Errors: MismatchError where records cannot be packed
for this model; DataError; DivergedError; MemoryLimitError.

    lfm run tune.full model=base train=pairs.jsonl --set pack=64 --out tuned
"""

from __future__ import annotations

from typing import Annotated, Literal

from lfm.core import Codec, Cost, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot
from lfm.data import packing
from lfm.data.chat import scored
from lfm.train import RECORDS, Fit, suited, taught, training


class Config(Fit, frozen=True):
    pack: Annotated[int, Meta(ge=0, description="tokens of a row that records share; 0: each has a row of its own")] = 0
    turns: Annotated[
        Literal["all", "last"], Meta(description="of a conversation: the assistant's turns that are scored")
    ] = "all"
    lr: Annotated[float, Meta(gt=0, description="peak learning rate (AdamW)")] = 6.25e-5
    batch_size: Annotated[int, Meta(ge=1, description="records a batch; rows where records are packed")] = 32
    warmup: Annotated[float, Meta(ge=0, lt=1, description="share of the steps in which the rate rises to its peak")] = (
        0.002
    )


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    module = model.ask(Gradients).module()
    train, dev = (scored(inputs.records(role), config.turns) for role in ("train", "dev"))
    taught(module, model, train, config, run, dev=dev, pack=config.pack)
    return model.ask(Gradients).rewrap(module)


def agree(config: Config, inputs: Inputs) -> None:
    given = {role: scored(records, config.turns) for role, records in inputs.data.items()}
    suited(config, Inputs(inputs.models, given))
    if config.pack:
        model = inputs.model("model")
        packing.packable(model.facts, config.pack)
        for records in given.values():
            packing.roomy(records, model, config.pack)


def cost(config: Config, sizes: Sizes) -> Cost:
    amount = sizes.data["train"]
    if config.pack and amount.records:
        amount = amount._replace(records=max(1, -(-amount.tokens // config.pack)))
    return training(config, sizes.model("model"), amount)


METHOD = Method(
    paper="Radford et al. 2018",
    config=Config,
    models={"model": Slot((Gradients, Codec), help="the model to tune")},
    data=RECORDS,
    agree=agree,
    forms=("checkpoint",),
    run=run,
    cost=cost,
)
