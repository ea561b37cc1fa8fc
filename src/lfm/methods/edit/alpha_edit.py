"""Change facts one batch after another, in directions that other text does not use.

    Δᵀ_l = (P(KKᵀ + K_pK_pᵀ) + L2·I)⁻¹ P K R_lᵀ,   P = UUᵀ,   R_l = (Z − H_L) / (L − l + 1)

U: the eigenvectors of C = E[k kᵀ] with the smallest eigenvalues, so that ΔU⊥ = 0: what other keys read along the
others stays as it is. K_p: the keys of the facts edited before, whose values are kept. The values z are edit.memit's:
for each fact a δ of the last block's output at the subject's last token that makes the new object likely; block after
block takes a share of what is still missing at the last.

Paper: AlphaEdit, arXiv 2410.02355. What differs: U holds at most the share `threshold` of tr C (the paper's bound on an
eigenvalue, 0.02, means something else in every model); L2 is `weight` · E‖Uᵀk‖² over text (the paper: 10 or 1); solved
inside U in as many dimensions as there are facts, so that what is kept of them is d × facts and not d × d; and all else
in which edit.memit differs from its paper: relative rates, blocks found by trying, C of little text, and no fact goes
in that greedy text does not show, or whose batch makes perplexity jump.

On the zoo's language model it is no better than edit.memit, whose C⁻¹ also weighs directions within U: of fifty facts
edited one by one in block 1, then all asked again, .94 are said (edit.memit: all); of twenty, .95 of the paraphrases
and .75 of other people's facts (1.00 and .85; docs/areas/edit.md). The paper's gains are on sequences of thousands,
with keys of 14336 dimensions.

Model: a causal or a masked language model, or an encoder-decoder, as in edit.memit. The result saves as a checkpoint or
as a LoRA adapter, one rank a fact and block. Errors: EditError; DataError where a prompt does not name its subject, or
for want of text.

    lfm run edit.alpha_edit model=base edits=edits.jsonl --out edited
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

from lfm.core import Inputs, Meta, Method, Model, Run
from lfm.core.heavy import torch
from lfm.editing import batch, keys, solve, value

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.editing.rows import Rows
    from lfm.editing.setting import Setting


class Config(batch.Batched, frozen=True):
    threshold: Annotated[float, Meta(gt=0, le=1, description="share of tr C in the directions that may change")] = 0.005
    weight: Annotated[float, Meta(gt=0, description="L2, over the mean ‖Uᵀk‖² of text")] = 0.3
    batch_size: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="facts edited at a time; none: all at once")
    ] = 100


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    return batch.edit(config, inputs, run, partial(solve.quiet, share=config.threshold), partial(editor, config))


def editor(config: Config, here: Setting, quiet: Callable[[int], solve.Quiet]) -> batch.Editor:
    """It remembers the keys of the facts that were kept, until another fact of the same subject shares one.

    quiet: block → its directions that may change.
    """
    past: dict[int, list[Tensor]] = {}

    def solved(block: int, key: Tensor) -> Tensor:
        basis, energy = quiet(block)
        before = solve.others(torch.cat([key[:, :0], *past.get(block, [])], 1), key)
        return solve.projected(basis, key, before, config.weight * energy)

    def kept(blocks: Sequence[int], reads: Sequence[Rows]) -> None:
        for block, key in keys.at_blocks(here.module, blocks, reads).items():
            past.setdefault(block, []).append(key.T)

    site = batch.site_of(here)
    return batch.Editor(
        site=site,
        find=lambda last, reads: value.search_all(here.module, last, reads, config, (site,)),
        solve=solved,
        kept=kept,
    )


METHOD = Method(
    paper="arXiv:2410.02355",
    config=Config,
    models=batch.MODELS,
    data=batch.DATA,
    run=run,
    cost=batch.cost,
    agree=partial(batch.agree, "edit.alpha_edit"),
    forms=("checkpoint", "adapter"),
)
