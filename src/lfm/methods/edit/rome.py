"""Change facts by one rank-one update each of one feed-forward projection.

    W' = W + (v* − W k*) uᵀ / (uᵀ k*),   u = C⁻¹ k*,   C = E[k kᵀ] over text

k* is the projection's input at the subject's last token, half the bare prompt's and half the mean behind texts of the
model's own; v* = W k* + δ, where δ makes the new object likely: it minimises −log p(new object) + essence·KL on what
follows "{subject} is a" + decay·‖δ‖/‖v₀‖ within ‖δ‖ ≤ reach·‖v₀‖. Of all W' with W'k* = v*, this one moves the outputs
of other keys least (in the metric C).

Paper: ROME, arXiv 2202.05262. The default variant is r-ROME (2403.07175): one k* throughout; `variant=rome` divides by
the bare prompt's key instead, as the first code did, and now and then disables the model. What differs from both: rate
and decay are relative to ‖v₀‖; the best δ met is kept, not the last; k* is no plain mean, under which the bare prompt's
own key was given but .3 to .8 of δ in a GPT-2, and five edits of ten went unsaid (now .9 to 1.04, and none); C, `ridge`
added, is of the model's own text if none is given, and of as much of it as moves the solve, at most ten tokens a
dimension (2506.04226: that is enough); the block is found by trying (2301.04213: where a fact is traced to does not
tell where to edit it). And what failed does not go in: an edit whose δ was not found, which greedy text does not show,
or after which perplexity jumps, is refused, or skipped and told of.

Model: a causal or a masked language model, or an encoder-decoder (2211.13317), its feed-forward layers found by
structure. A masked one has as many blanks as the new object has tokens, filled at once; an encoder-decoder's blocks are
numbered through, the encoder's first: there k* is the subject's, in the decoder that of the place where the object
begins. With `token=object` it is so in any model: a masked one may look its facts up at the blank and not at the
subject (the zoo's does, docs/areas/edit.md). Both need `text`, of which prefixes are taken too. Edits are made one
after another, all in one block. The result saves as a checkpoint or as a LoRA adapter, one rank an edit. Errors:
EditError; DataError where a prompt does not name its subject, or for want of text.

    lfm run edit.rome model=base edits=edits.jsonl --out edited
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot, Weights
from lfm.core.config import values
from lfm.core.heavy import torch
from lfm.core.interfaces import LowRank
from lfm.editing import choose, covariance, form, keys, rows, sequence, setting, value
from lfm.editing.covariance import ENOUGH, factored, loaded, rank_one
from lfm.models import structure

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.data.records import Edit
    from lfm.editing.keys import Changes
    from lfm.editing.rows import Rows
    from lfm.editing.setting import Setting
    from lfm.editing.value import Found


class Config(sequence.Guard, frozen=True):
    variant: Annotated[Literal["r-rome", "rome"], Meta(description="whose key divides: the mean, or the prompt's")] = (
        "r-rome"
    )
    layer: Annotated[int | None, Meta(description="block to edit, from 0; none: try them on the first edits")] = None
    prefixes: Annotated[int, Meta(ge=0, description="texts of the model's own put before the prompt")] = 20
    tokens: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="most tokens for C; none: ten a dimension of the key")
    ] = None
    ridge: Annotated[float, Meta(ge=0, description="added to C, in units of its mean diagonal")] = 0.001


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    edits: list[Edit] = list(inputs.records("edits"))
    here = setting.opened(
        model,
        inputs.records("text"),
        run,
        prefixes=config.prefixes,
        tokens=config.tokens,
        token=config.token,
    )
    block = config.layer
    if block is None:
        brief = choose.brief(here)
        tried = trial(brief, solver(config, brief, run))
        block = choose.block(brief, choose.first(edits), run, tried, {"id": "edit.rome", **values(config)})
    name, layer = keys.projection(here.module, block)
    run.note(layer=block, module=name)

    weights, gradients = model.ask(Weights), model.ask(Gradients)
    stored = weights.tensors().get(f"{name}.weight")
    solve = solver(config, here, run, block)
    changes = sequence.apply(
        here,
        block,
        edits,
        lambda *asked: solve(block, *asked)[1:],
        config,
        stored.dtype if stored else torch.float32,
        run,
        inputs.records("earlier"),
    )
    if stored is None:  # its files hold this weight under another name
        return gradients.rewrap(here.module)
    b, a = (torch.stack(vectors) for vectors in zip(*changes, strict=True))
    return weights.update({name: LowRank(b.T.contiguous(), a, structure.transposed(layer))})


def solver(
    config: Config, here: Setting, run: Run, first: int | None = None
) -> Callable[..., tuple[Rows, Found, tuple[Tensor, Tensor]]]:
    """(block, edit, those made before) → its rows, its value and its (b, a), for the module as it is when called.

    first: a block that is asked for for certain.
    """
    lowers: dict[int, Tensor] = {}

    def ready(block: int) -> None:
        lowers.clear()  # one at a time: they are large. Edits of its own block do not change it
        found = covariance.moments(here, [block], run, config.ridge)[block]
        lowers[block] = factored(loaded(found.matrix, config.ridge))
        if block == first:
            run.note(**covariance.notes([found[1:]]))

    if first is not None:
        ready(first)

    def solve(block: int, edit: Edit, made: Sequence[Edit] = ()) -> tuple[Rows, Found, tuple[Tensor, Tensor]]:
        if block not in lowers:
            ready(block)
        read = here.read(edit, block)
        k, _ = keys.at_subject(here.module, block, read)
        earlier = [here.read(other, block) for other in sequence.near(made, [edit])]
        found = value.search(here.module, block, read, config, earlier)
        if config.variant == "rome":
            return read, found, rank_one(found.delta, k.mean(0), lowers[block], k[0])
        return read, found, rank_one(found.delta, keys.mean(k), lowers[block])

    return solve


def trial(here: Setting, solve: Callable[..., tuple[Rows, Found, tuple[Tensor, Tensor]]]) -> choose.Solve:
    """What the choice of a block asks for: the last of a subject's edits, whose value says the others too."""

    def made(block: int, edits: Sequence[Edit]) -> tuple[list[Rows], Changes]:
        *others, edit = edits
        read, _, (b, a) = solve(block, edit, others)
        return [*(here.read(other, block) for other in others), read], {block: (b[:, None], a[None])}

    return made


def agree(config: Config, inputs: Inputs) -> None:
    rows.agree(inputs.records("edits"), inputs.model("model"))
    layers = () if config.layer is None else (config.layer,)
    form.editable("edit.rome", inputs.model("model"), inputs.records("text"), layers)


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, edits = sizes.model("model"), sizes.data["edits"]
    inner = 4 * facts.width  # of the key, not known before the weights are
    tokens = config.tokens or ENOUGH * inner
    tried = len(choose.candidates(facts.layers)) if config.layer is None and facts.layers else 0
    prompt = setting.PREFIX + edits.tokens // max(1, edits.records)
    searches = edits.records + tried * min(choose.SUBJECTS, edits.records)
    search = 4.0 * facts.parameters * config.steps * (config.prefixes + 2) * prompt
    moment = 2.0 * tokens * (facts.parameters + inner**2) + inner**3 / 3
    return Cost(
        flops=searches * search + (1 + tried) * moment + 2.5 * facts.parameters * tokens,
        steps=searches * 2 * config.steps,
        memory=4 * facts.parameters + 3 * 8 * inner**2 + 24 * prompt * (config.prefixes + 2) * facts.vocabulary,
        disk=facts.bytes,
    )


METHOD = Method(
    paper="arXiv:2202.05262",
    config=Config,
    models={"model": Slot((Gradients, Weights, Codec), help="the language model to edit")},
    data={
        "edits": DataSlot(Data.FEW_SHOT, ("edit",), help="facts to change"),
        "text": DataSlot(Data.UNLABELED, ("text",), optional=True, help="running text, whose keys should not change"),
        "earlier": sequence.EARLIER,
    },
    run=run,
    cost=cost,
    agree=agree,
    forms=("checkpoint", "adapter"),
)
