"""Change many facts at once, by one closed-form change of the feed-forward projections of a few blocks.

    Δ_l = R_l A_l,   R_l = (Z − H_L) / (L − l + 1),   A_l = Kᵀ (λC + KKᵀ)⁻¹,   C = E[k kᵀ] over text

For each fact a value z = h + δ of the last block L's output at the subject's last token is searched for, as edit.rome
searches its own: δ minimises −log p(new object) + essence·KL on what follows "{subject} is a" + decay·‖δ‖/‖h‖ within
‖δ‖ ≤ reach·‖h‖. Block after block then takes a share of what is still missing at the last: K (in, n) holds the facts'
keys there, and A is the least squares between what they ask and what other keys keep. `variant`:

- memit: the above. λ = `weight` · in. The paper's 15000 and 20000 for keys of 16384 and 6400 dimensions are 0.9 and 3.1
  in this unit, with C of an encyclopedia; with C of a small model's own text 1 undershot.
- emmet: A = (KᵀC⁻¹K)⁻¹ KᵀC⁻¹, every key exactly its value; in one block, unless told otherwise. For one fact r-ROME's.
- pmet: δ of the attention's and of the feed-forward layer's output are found together, the latter alone is written;
  R_l is divided by √(L − l + 1). These outputs are short beside h: `reach` is better 4, as in edit.rome.

Paper: MEMIT, arXiv 2210.07229; EMMET, 2403.14236; PMET, 2308.08742. What differs: rate and decay are relative to ‖h‖,
and steps go along the gradient, where Adam's go along its signs; the best δ met is kept; the blocks are found by
trying; C is of ten tokens a dimension with `ridge` added, of the model's own text if none is given; EMMET's regulariser
is left out. And what failed does not go in: facts whose δ was not found, or that greedy text does not show afterwards,
are refused, or skipped, told of, and the others solved anew.

On the zoo's language model, twenty facts of twenty people at once in block 1: all are said in greedy text, in all of
their paraphrases too, and .85 of other people's facts stay. edit.rome takes nine times as long, and seventeen of its
edits hold (docs/areas/edit.md).

Model: a causal or a masked language model, or an encoder-decoder (blocks numbered through, the encoder's first; a
change is spread over blocks of one of them), its layers found by structure; `token` as in edit.rome. Where a norm
follows what a block adds up, as in BERT, values are of the feed-forward layer's output. `batch_size` facts are edited
at a time, all of them unless told; within a batch their order does not matter. Facts of one subject whose prompts begin
alike have one key: they share one value that says them all (the paper's would be found apart, and the solve take their
mean), earlier batches' facts among them. The result saves as a checkpoint or as a LoRA adapter, one rank a fact and
block. Errors: EditError; DataError where a prompt does not name its subject, or for want of text.

    lfm run edit.memit model=base edits=edits.jsonl --out edited
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from lfm.core import Inputs, Meta, Method, Model, Run
from lfm.editing import batch, covariance, solve, value

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.editing.setting import Setting


class Config(batch.Batched, frozen=True):
    variant: Annotated[
        Literal["memit", "emmet", "pmet"], Meta(description="least squares, equality, or a value of the FFN alone")
    ] = "memit"
    weight: Annotated[float, Meta(gt=0, description="λ of memit and pmet, over the key's dimension")] = 0.1


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    return batch.edit(
        config, inputs, run, covariance.factored, partial(editor, config), alone=config.variant == "emmet"
    )


def editor(config: Config, here: Setting, lower: Callable[[int], Tensor]) -> batch.Editor:
    """The variant's. lower: block → the Cholesky factor of its C."""

    def solved(block: int, keys: Tensor) -> Tensor:
        if config.variant == "emmet":
            return solve.exact(lower(block), keys)
        return solve.balanced(lower(block), keys, config.weight * len(keys))

    pmet = config.variant == "pmet"
    sites = ("attention_out", "ffn_out") if pmet else (batch.site_of(here),)
    return batch.Editor(
        site=sites[-1],
        find=lambda last, reads: value.search_all(here.module, last, reads, config, sites),
        solve=solved,
        share=math.sqrt if pmet else float,
    )


METHOD = Method(
    paper="arXiv:2210.07229",
    config=Config,
    models=batch.MODELS,
    data=batch.DATA,
    run=run,
    cost=batch.cost,
    agree=partial(batch.agree, "edit.memit"),
    forms=("checkpoint", "adapter"),
)
