"""Change facts in one step from their gradients, without a search for values and without the covariance of text.

    ΔW = Vᵀ H (HᵀH + ρI)⁻¹,   V = −s·rms(v)·(‖ĥ‖²/in) ĝ,   [ĥ, ĝ] = ([h, g] − μ) / σ

H (tokens, in): what a feed-forward projection reads at each token of the facts (prompt and new object), v what it
writes, g the gradient of −log p(new object) there. μ and σ are of each coordinate over all facts seen so far, of
earlier batches too: the lifelong normalisation, which is all that is kept from batch to batch. One forward and one
backward pass a batch.

Paper: UltraEdit, arXiv 2505.14679. What differs: the step s is a `strength` in units of what the projection writes, and
is found on the first batch (the least of 0.1, 0.14, … 3.2 at which all facts are said in greedy text, or else most are,
while perplexity allows), where the paper has a rate and a list of layers for each model and data set; ρ is in units of
the mean ‖h‖²; the last projection of each block of the upper half is edited. And no fact goes in that greedy text does
not show, or whose batch makes perplexity jump.

On the zoo's language model it does best of what changes weights on ten facts of many relations (all said, .88 of their
paraphrases, .78 of the neighbours stay), and is the bluntest on twenty of one relation at once (19 said, all of their
paraphrases, .40 of other people's facts stay; edit.memit 20 and .83): docs/areas/edit.md.

Model: a causal or a masked language model, its layers found by structure. Within a batch the order of facts does not
matter. The result saves as a checkpoint or as a LoRA adapter, of a rank a token. Errors: EditError; DataError where a
prompt does not name its subject, or for a masked model without `text`.

    lfm run edit.ultra model=base edits=edits.jsonl --out edited
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

from lfm.core import Cost, Inputs, Meta, Method, Model, Run, Sizes, Weights
from lfm.core.heavy import torch
from lfm.editing import batch, form, keys, outcome, sequence, setting
from lfm.editing.outcome import Held
from lfm.editing.slopes import Running, Seen, seen
from lfm.models import structure

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.data.records import Edit
    from lfm.editing.keys import Changes, Projections
    from lfm.editing.rows import Rows
    from lfm.editing.setting import Setting

STRENGTHS = tuple(0.1 * 2 ** (i / 2) for i in range(11))
TEXT = 4096
"""Tokens that the model says by itself where no text is given; perplexity is watched on a fifth of them."""


class Config(Held, frozen=True):
    layers: Annotated[tuple[int, ...], Meta(description="blocks to edit, from 0; none: the upper half")] = ()
    strength: Annotated[Annotated[float, Meta(gt=0)] | None, Meta(description="s; none: found on the first batch")] = (
        None
    )
    ridge: Annotated[float, Meta(gt=0, description="ρ, over the mean ‖h‖²")] = 0.01
    batch_size: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="facts edited at a time; none: all at once")
    ] = 100


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    here = setting.opened(model, inputs.records("text"), run, prefixes=0, tokens=TEXT)
    stack = len(structure.blocks(here.module))
    blocks = sorted({block % stack for block in config.layers}) or list(range(stack // 2, stack))
    stored = model.ask(Weights).tensors()
    projections = keys.Projections(here.module, blocks, {name: each.dtype for name, each in stored.items()})
    run.note(layers=", ".join(map(str, blocks)), modules=", ".join(projections.names.values()))
    guard = sequence.Guard(collapse=config.collapse, on_failure=config.on_failure)
    how = shifter(config, here, projections, run)
    edits, earlier = list(inputs.records("edits")), inputs.records("earlier")
    batch.apply(here, projections, edits, how, guard, run, config.batch_size, earlier)
    return batch.edited(model, here, projections)


def shifter(config: Config, here: Setting, projections: Projections, run: Run) -> batch.Shifter:
    """It remembers the normalisation and the strength, and what it saw of the batch that was begun."""
    running: dict[int, Running] = {}
    now: dict[int, Seen] = {}
    strength = config.strength

    def begin(reads: Sequence[Rows], edits: Sequence[Edit]) -> None:
        nonlocal strength
        now.update(seen(here, projections.blocks, reads))
        for block, each in now.items():
            both = torch.cat([each.h, each.g], 1)
            empty = Running(0, torch.zeros(both.shape[1]).double(), torch.zeros(both.shape[1]).double())
            running[block] = running.get(block, empty).also(both)
        if strength is None:
            strength = run.step(
                "strength", lambda: _least(here, projections, edits, partial(shift, range(len(edits))), config.collapse)
            )
            run.note(strength=strength)

    def shift(places: Sequence[int], step: float) -> Changes:
        return {block: change(each, running[block], places, step, config.ridge) for block, each in now.items()}

    return batch.Shifter(begin, lambda places: shift(places, strength or 0.0))


def change(each: Seen, running: Running, places: Sequence[int], strength: float, ridge: float) -> tuple[Tensor, Tensor]:
    """(b (out, tokens), a (tokens, in)) of the edits at these places of the batch."""
    kept = torch.isin(each.owner, torch.tensor(list(places)))
    h, g, v = each.h[kept], each.g[kept], each.v[kept]
    normal = running.normal(torch.cat([h, g], 1))
    size = strength * v.square().mean().sqrt() * normal[:, : h.shape[1]].square().mean(1, keepdim=True)
    wanted = -size * normal[:, h.shape[1] :]
    load = ridge * h.square().sum(1).mean()
    if len(h) <= h.shape[1]:
        a = torch.linalg.solve(h @ h.T + load * torch.eye(len(h), dtype=h.dtype), h)
    else:
        a = torch.linalg.solve(h.T @ h + load * torch.eye(h.shape[1], dtype=h.dtype), h.T).T
    return wanted.T.contiguous().float(), a.contiguous().float()


def _least(
    here: Setting, projections: Projections, edits: Sequence[Edit], shifted: Callable[[float], Changes], collapse: float
) -> float:
    """The least strength at which all edits are said, or else the least of those at which most are, while perplexity
    does not collapse."""
    said: dict[float, int] = {}
    before = here.perplexity()
    for strength in STRENGTHS:
        projections.show(shifted(strength))
        if said and not here.perplexity() <= collapse * before:
            break
        said[strength] = sum(here.says(outcome.wanted(edits)))
        if said[strength] == len(edits):
            break
    projections.show({})
    return max(said, key=lambda strength: (said[strength], -strength))


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, edits = sizes.model("model"), sizes.data["edits"]
    inner = 4 * facts.width  # of what is read, not known before the weights are
    blocks = len(config.layers) or max(1, facts.layers // 2)
    tokens = min(edits.tokens, (config.batch_size or edits.records) * edits.tokens // max(1, edits.records))
    batches = max(1, edits.tokens // max(1, tokens))
    said = 8.0 * facts.parameters * edits.tokens
    return Cost(
        flops=6.0 * facts.parameters * (edits.tokens + TEXT) + said + batches * blocks * 2.0 * tokens**2 * inner,
        steps=2 * batches,
        memory=4 * facts.parameters + blocks * 8 * facts.width * inner + 34 * tokens * facts.width,
        disk=facts.bytes,
    )


METHOD = Method(
    paper="arXiv:2505.14679",
    config=Config,
    models=batch.MODELS,
    data=batch.DATA,
    run=run,
    cost=cost,
    agree=partial(batch.agree, "edit.ultra", tasks=(form.CAUSAL_LM, form.MASKED_LM)),
    forms=("checkpoint", "adapter"),
)
