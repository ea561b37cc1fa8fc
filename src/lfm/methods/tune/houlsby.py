"""Train bottleneck adapters between frozen layers.

    y = h + s (W_up σ(W_down h + b_down) + b_up),   W_down ∈ R^(m×d), W_up ∈ R^(d×m), W_up = 0 at first

Paper: Houlsby et al., arXiv 1902.00751: h is what attention and the feed-forward layer of each block give, before the
residual sum; 2md + d + m parameters each; the norms' gains and biases and a classifier's head train along.
form=parallel, of 2110.04366, has the adapter read what the layer reads and add to what it gives. Differs from the
paper: W_up begins at 0, where theirs is small, so that the first forward is the base's to the bit; the adapter stands
before the layer's dropout, not after it; of a decoder's two attentions the first is adapted.

Models: any with Gradients and a codec (causal, masked, seq2seq, classifier, ViT). Places are found by structure. Data:
every record kind, as its task. The result is a PEFT directory of type HOULSBY over the base, which plain peft loads
once lfm is imported. It cannot be merged: there is a σ inside. Errors: MismatchError where there are no blocks;
DivergedError.

    lfm run tune.houlsby model=base train=facts.jsonl --set width=8 --out adapted
"""

from __future__ import annotations

from typing import Annotated, Literal

from lfm import tuners
from lfm.core import Cost, Inputs, Meta, Method, Model, Run, Sizes
from lfm.train import RECORDS, suited
from lfm.tuners.tuning import MODEL, Tuning, cost_of, tuned


class Config(Tuning, frozen=True):
    width: Annotated[int, Meta(ge=1, description="m, of the bottleneck")] = 64
    form: Annotated[
        Literal["sequential", "parallel"], Meta(description="after attention and feed-forward layer, or beside them")
    ] = "sequential"
    parts: Annotated[
        Literal["both", "attention", "ffn"], Meta(description="which parts of a block have an adapter")
    ] = "both"
    activation: Annotated[Literal["gelu", "relu", "silu"], Meta(description="σ")] = "gelu"
    scale: Annotated[float, Meta(gt=0, description="s, on what the adapter adds")] = 1.0
    train_norms: Annotated[
        bool, Meta(description="train the norms' gains and biases as well; tune.adapter_fusion takes adapters without")
    ] = True


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    settings = tuners.HoulsbyConfig(
        width=config.width,
        form=config.form,
        parts=("attention", "ffn") if config.parts == "both" else (config.parts,),
        activation=config.activation,
        scale=config.scale,
        train_norms=config.train_norms,
    )
    return tuned(config, inputs, run, settings)


def cost(config: Config, sizes: Sizes) -> Cost:
    facts = sizes.model("model")
    each = (2 * config.width + 1) * facts.width + config.width
    return cost_of(config, sizes, each * facts.layers * (2 if config.parts == "both" else 1))


METHOD = Method(
    paper="arXiv:1902.00751",
    config=Config,
    models=MODEL,
    data=RECORDS,
    forms=("adapter",),
    agree=suited,
    run=run,
    cost=cost,
)
