"""Tune a soft prompt from answers alone: no weights, no gradients, over an API.

    P = reshape(A z) + P₀,  z ∈ R^d,  A_ij ~ N(0, σ_A²),  σ_A = α · std(E) / (√d · σ)
    z* = argmin_z 1/n Σᵢ loss(log p(w(·) | P(z), xᵢ), yᵢ)          by a search from z = 0 with step size σ

Paper: Black-Box Tuning for Language-Model-as-a-Service, arXiv 2201.03514, and its code (txsun1997/Black-Box-Tuning).
E is the input-embedding table; P₀ the embeddings of random tokens; loss the cross-entropy, or the hinge
Σ_{j≠y} max(0, m + log p_j − log p_y), over the first tokens of the labels' words w. Causal, masked and encoder-decoder
models; a template says with {mask} where a masked one answers. Differs from the paper: the code adds the prompt to
words of the template, after the embeddings' own norm, which no interface of input embeddings can; CMA-ES of d = 500
learns nothing of its covariance in 8000 calls, so the default search is one of low rank (`search`); every `dev_every`
generations the best of that generation is held against the dev records, and z = 0 is a candidate too, so that the kept
prompt is never worse than none of it on the records that choose. The words' tokens are asked for by name; one that is
not told all the same gets the least log-probability told, of the `top` most probable ones.

Model: Embeddings. Data: train, and dev to choose by (else what train has beyond `examples`; else the training loss
chooses). Each gives at most `examples` records, evenly of each class: label or pair records, worded by
`template` ("{text}", "{text_b}"; their own wording by default) and `words` (label → word; the label by default).
Result: a program that holds P (t, width) and its model; as a second format, a PEFT prompt, where that is a local
causal checkpoint. A text that is too long with the prompt before it loses its beginning, in training as when asked;
the template, and what follows the answer, stay (`texts_shortened` tells how many). model=api:URL tunes for any
endpoint that takes input embeddings and gives its table (`lfm serve`).
Errors: ConfigError where two labels' words begin with the same token; DataError for a single label, or where a
template leaves a text no room; BudgetError stops it, and it goes on from there.

    lfm run prompt.bbt model=serve:model train=train.jsonl dev=dev.jsonl --set d=50 --set calls=200 --out tuned
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any

from lfm.core import Cost, Data, DataSlot, Embeddings, Inputs, Meta, Method, Model, Parts, Run, Sizes, Slot
from lfm.core.heavy import torch
from lfm.models.program import program
from lfm.models.prompted import peft_format, prompted
from lfm.prompting import blackbox
from lfm.prompting.template import frame

ID = "prompt.bbt"


class Config(blackbox.Setting, frozen=True):
    top: Annotated[int, Meta(ge=1, description="next tokens asked for; an endpoint may tell fewer")] = 20


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    embeddings = model.ask(Embeddings)
    table = embeddings.table()
    size = config.prompt_tokens * table.shape[1]
    a = blackbox.projection(float(table.float().std(correction=0)), size, config, run.generator("A"))
    p0 = table[torch.randint(len(table), (config.prompt_tokens,), generator=run.generator("p0"))]
    train, dev = blackbox.prepared(config, embeddings, inputs, run)
    tell = blackbox.teller(embeddings, config.top)
    prompt = blackbox.tuned(config, [a], p0[None], tell, train, dev, run)[0]
    made = program(ID, config, Parts({"model": (model,)}, {"prompt": prompt}, {}), opened)
    return replace(made, formats={**made.formats, **peft_format(model, prompt)}, _opened={})


def opened(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The part behind the saved prompt."""
    return prompted(parts.model("model"), parts.tensors["prompt"], frame(config.template))


def cost(config: Config, sizes: Sizes) -> Cost:
    return blackbox.cost(config, sizes, 1)


METHOD = Method(
    paper="https://arxiv.org/abs/2201.03514",
    config=Config,
    models={"model": Slot((Embeddings,), help="the model to prompt; an endpoint will do")},
    data={
        "train": DataSlot(Data.FEW_SHOT, kinds=("label", "pair"), help="a few examples of each class"),
        "dev": DataSlot(Data.FEW_SHOT, kinds=("label", "pair"), optional=True, help="to choose the best prompt by"),
    },
    run=run,
    cost=cost,
    agree=blackbox.agree,
    open=opened,
)
