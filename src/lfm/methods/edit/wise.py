"""Write facts into a side copy of one projection, and answer by it where it differs from the first by enough.

    y = W′k if ‖(W′ − W) k‖ > ε else W k,   W′ = W + TIES(Δ₁, …, Δ_s),   Δᵢ trained on its share of the edits, masked
    loss = −mean log p(new object) + [Δ_out − α]₊ + [β − Δ_in]₊ + [γ − (Δ_in − Δ_out)]₊,   Δ = ‖(W′ − W) k‖

Paper: WISE (WISE-Merge), arXiv 2405.14768. Each of `shards` masks leaves a random `mask` of the entries free; the
shards are merged by TIES; ε is `ratio` × the least Δ of an edit's tokens after the merge. What differs: each token is
routed by itself, not a text by its tokens' mean, so that text made with a cache, without one, and scored is the same;
inside are the tokens that lead to the object, outside all of running text and the rest of the prompt; margins are in
units of the mean ‖W k‖ over text, in the paper's proportions (5 : 20 : 10); Adam, its rate in units of W's root mean
square; `mask` and steps (.2 and 70 there) are what forty edits of the zoo's small projections took. All edits are
learned together; those that are then not said end the run, or the others are learned anew.

Model: a causal, masked or encoder-decoder language model, its block found by structure; the last two need `text`.
Inside are a masked one's blanks, or, where `layer` names an encoder's block, the subject's last token. The result is a
program that stores W′ − W. `memory=`
adds another copy to those of earlier runs: the one that differs most answers, as in WISE-Retrieve, each by its own ε. A
run's edits come off together; one of them cannot (edit.grace can do that). Notes are of greedy text. Errors: EditError,
also where other text suffers; DataError.

    lfm run edit.wise model=base edits=edits.jsonl --out beside
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lfm.core import Cost, Inputs, Kept, Meta, Method, Model, Parts, Run, Sizes
from lfm.core.errors import EditError
from lfm.core.heavy import nn, torch
from lfm.editing import asking, form, keys, outcome, remembering, rows, sequence, setting, settled, side
from lfm.editing.side import Sides
from lfm.models import forward, structure
from lfm.models.program import program
from lfm.train import fit

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch
    from lfm.data.records import Edit
    from lfm.editing.cloze import Asked
    from lfm.editing.setting import Setting

ID = "edit.wise"


class Config(outcome.Trained, frozen=True):
    layer: Annotated[int | None, Meta(description="block to edit, from 0; none: five sixths of the way up")] = None
    shards: Annotated[int, Meta(ge=1, description="parts of the edits, each learned under a mask of its own")] = 2
    mask: Annotated[float, Meta(gt=0, le=1, description="share of the entries that a shard may change")] = 0.5
    density: Annotated[float, Meta(gt=0, le=1, description="share of each shard's changes kept in the merge")] = 0.53
    margin: Annotated[float, Meta(gt=0, description="β over the mean ‖W k‖ of text; α is a quarter of β, γ half")] = 0.5
    ratio: Annotated[float, Meta(gt=0, le=1, description="ε over the least Δ of an edit's tokens")] = 0.88
    tokens: Annotated[int, Meta(ge=1, description="tokens of text that must not be routed")] = 4096
    steps: Annotated[int, Meta(ge=1, description="steps of Adam for each shard")] = 100
    batch_size: Annotated[int, Meta(ge=1, description="edits a batch")] = 32
    lr: Annotated[float, Meta(gt=0, description="Adam's rate in units of W's root mean square")] = 0.1
    warmup: Annotated[float, Meta(ge=0, lt=1, description="share of the steps in which the rate rises")] = 0.0
    schedule: Annotated[
        Literal["cosine", "linear", "constant"], Meta(description="how the rate falls after the warm-up")
    ] = "linear"


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model, edits = inputs.model("model"), list(inputs.records("edits"))
    before = settled.earlier(model, inputs.all("memory"), Sides)
    if before:
        side.strangers(before, edits)
    here = setting.opened(model, inputs.records("text"), run, prefixes=0, tokens=config.tokens)
    block = before.block if before else form.numbered(here.module, _block(here, config))
    around = run.step("before", lambda: sequence.kept_around(here, edits))
    first = here.perplexity()
    unit = run.step("mean length", lambda: side.length(here, block))

    def make(edits: Sequence[Edit]) -> tuple[Sides, float]:
        change, threshold = beside(config, here, block, edits, unit, run)
        least = torch.tensor([threshold], dtype=torch.float64)
        new = Sides(model.digest, block, tuple(edits), (0,) * len(edits), change[None].cpu(), least)
        return (side.learn(before, new) if before else new), threshold

    def says(made: tuple[Sides, float], asked: Sequence[Asked]) -> list[bool]:
        off = side.attach(here.module, made[0])
        told = here.says(asked)
        off()
        return told

    def unsaid(silent: Sequence[Edit], _: Any) -> EditError:
        return _unsaid(silent, block, config.shards)

    (kept, threshold), made, failed = outcome.together(edits, make, says, config.on_failure, unsaid)
    off = side.attach(here.module, kept)
    after = here.perplexity()
    fix = "a larger margin, more steps, or another layer"
    if refused := outcome.collapsed("the side copy", first, after, config.collapse, fix):
        raise refused
    run.note(
        layer=block,
        edits=len(kept.edits),
        sides=len(kept.changes),
        **outcome.skipped([*map(outcome.unsaid, failed)]),
        threshold=threshold,
        unit=unit,
        perplexity_before=first,
        perplexity_after=after,
        **run.step("measured", lambda: sequence.measured(here, made, edits, around)),
    )
    off()
    return program(ID, config, kept.parts(model), open)


def _unsaid(silent: Sequence[Edit], block: int, shards: int) -> EditError:
    return EditError(
        f"{silent[0].prompt!r} cannot be made to say {silent[0].new_object!r} in block {block}, nor "
        f"{len(silent) - 1} others",
        why=f"after the merge of up to {shards} shards the side copy does not tell them",
        fix="more steps, a larger lr or mask, fewer shards, another layer, or on_failure=skip",
    )


def _block(here: Setting, config: Config) -> int:
    """Where none is named: five sixths of the way up, in the stack that tells."""
    if config.layer is not None:
        return config.layer
    stacks = structure.stacks(here.module)
    return sum(map(len, stacks[:-1])) + 5 * len(stacks[-1]) // 6


def beside(
    config: Config, here: Setting, block: int, edits: Sequence[Edit], unit: float, run: Run
) -> tuple[Tensor, float]:
    """The merged change of the weight, as it is stored, and the distance from which on it answers."""
    shards = [edits[i :: config.shards] for i in range(min(config.shards, len(edits)))]
    changes = [
        learned(config, here, block, part, unit, run, f"shard {i} of {len(edits)}") for i, part in enumerate(shards)
    ]
    change = side.ties(changes, config.density) if len(changes) > 1 else changes[0]
    return change, config.ratio * float(side.inside(here, block, edits, change).min())


def learned(
    config: Config, here: Setting, block: int, edits: Sequence[Edit], unit: float, run: Run, name: str
) -> Tensor:
    """A shard's change of the weight, as it is stored, zero outside its mask."""
    _, layer = keys.projection(here.module, block)
    weight = layer.weight.detach()
    free = torch.rand(weight.shape, generator=run.generator(name, "mask")).to(weight.device) < config.mask
    copy = nn.ParameterList([nn.Parameter(torch.zeros_like(weight))])
    beta = config.margin * unit

    def loss(copy: nn.Module, batch: Batch) -> Tensor:
        scope, real = batch["scope"].bool(), batch["real"].bool()
        with side.answering(layer, copy[0] * free, scope) as far:  # type: ignore[index]
            told = asking.answer_logprobs(forward(here.module, batch), batch["labels"])
        asked = (batch["labels"] != rows.IGNORED).sum(1)
        unsaid = -(told / asked.clamp(min=1))[asked > 0].mean()
        index = scope.nonzero()[:, 0]
        each = torch.stack([far[0][scope][index == row].mean() for row in index.unique()])
        return unsaid + side.margins(each, far[0][real & ~scope], beta / 4, beta, beta / 2) / unit

    size = float(weight.double().square().mean().sqrt()) or 1.0
    fit(copy, range(len(edits)), side.lessons(here, block, edits), loss, config, run, name=name, scale=lambda _: size)
    return (copy[0] * free).detach()


def open(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The interfaces of the program: those of the model, its tokens routed, and the copies."""
    return remembering.interfaces(parts, side.opened(parts), side.attach)


def agree(config: Config, inputs: Inputs) -> None:
    remembering.agree(ID, inputs, config.layer)


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, edits = sizes.model("model"), sizes.data["edits"]
    steps = config.steps * min(config.shards, max(1, edits.records))
    tokens = min(config.batch_size, edits.records) * (side.TEXT + edits.tokens / max(1, edits.records))
    return Cost(
        flops=facts.parameters * (6.0 * tokens * steps + 2.5 * config.tokens),
        steps=2 * steps,
        memory=int(4 * facts.parameters + 100 * facts.width**2 + 12 * tokens * facts.vocabulary),
        disk=16 * facts.width**2,
    )


METHOD = Method(
    paper="arXiv:2405.14768",
    config=Config,
    models=remembering.models(ID, Sides, forgets=False),
    data=remembering.DATA,
    run=run,
    cost=cost,
    agree=agree,
    open=open,
    forms=("program",),
    kept=Kept(Sides, side.learn, side.taken),
)
