"""Tune a prompt at every block from answers alone: no gradients, one search a block.

    h_l ← h_l + reshape(A_l z_l) at the prompt's places, l = 1 … L;  at the input, P₀ + reshape(A_0 z_0)
    A_l ~ N(0, σ_l²),  σ_l = α · ŝ_l / (√d · σ),  ŝ_l = std of what block l reads, clipped at ±3 of its stds five times
    each generation searches one z_l, the others at their best so far; then the next block's, and round again

Paper: BBTv2, arXiv 2205.11200, and its code (deepbbt.py of txsun1997/Black-Box-Tuning). ŝ_0 is that of the embedding
table. Losses, records, P₀ and the choice by dev records are prompt.bbt's, and so are its differences from the code;
`calls` are those of all blocks together.

Model: Embeddings and Injection (hidden states of the prompt's places, added to as the model reads; a server would have
to offer `spread` and `told` of lfm.core.Injection, and none that is known to us does): a checkpoint in this process.
Result: a program that holds the prompts (blocks, t, width) and its model; of a causal checkpoint also a PEFT prefix,
which says the same: what a prompt adds at each block is keys and values to the text. Errors: those of prompt.bbt.

    lfm run prompt.bbtv2 model=model train=train.jsonl dev=dev.jsonl --set d=50 --set calls=200 --out tuned
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lfm.core import Cost, Data, DataSlot, Embeddings, Injection, Inputs, Method, Model, Parts, Run, Sizes, Slot
from lfm.core.heavy import torch
from lfm.models.program import program
from lfm.models.prompted import deep_prompted, prefix_format
from lfm.prompting import blackbox
from lfm.prompting.template import frame

ID = "prompt.bbtv2"


class Config(blackbox.Setting, frozen=True):
    pass


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    embeddings, injection = model.ask(Embeddings), model.ask(Injection)
    table = embeddings.table()
    p0 = table[torch.randint(len(table), (config.prompt_tokens,), generator=run.generator("p0"))]
    train, dev = blackbox.prepared(config, embeddings, inputs, run)
    stds = [float(table.float().std(correction=0)), *run.step("spread", lambda: list(injection.spread(p0, train.rows)))]
    size = config.prompt_tokens * table.shape[1]
    layers = [blackbox.projection(std, size, config, run.generator("A", i)) for i, std in enumerate(stds)]
    start = torch.cat([p0[None], torch.zeros(len(stds) - 1, *p0.shape)])
    prompt = blackbox.tuned(config, layers, start, injection.told, train, dev, run)
    made = program(ID, config, Parts({"model": (model,)}, {"prompt": prompt}, {}), opened)
    return replace(made, formats={**made.formats, **prefix_format(model, prompt)}, _opened={})


def opened(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The part with the saved prompts at its blocks."""
    return deep_prompted(parts.model("model"), parts.tensors["prompt"], frame(config.template))


def cost(config: Config, sizes: Sizes) -> Cost:
    return blackbox.cost(config, sizes, max(sizes.model("model").layers, 1))


METHOD = Method(
    paper="https://arxiv.org/abs/2205.11200",
    config=Config,
    models={"model": Slot((Embeddings, Injection), help="the model to prompt, in this process")},
    data={
        "train": DataSlot(Data.FEW_SHOT, kinds=("label", "pair"), help="a few examples of each class"),
        "dev": DataSlot(Data.FEW_SHOT, kinds=("label", "pair"), optional=True, help="to choose the best prompt by"),
    },
    run=run,
    cost=cost,
    agree=blackbox.agree,
    open=opened,
)
