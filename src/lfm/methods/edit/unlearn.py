"""Make a model forget what a set of records says, while it keeps what another says.

    ga    mean log p(forget)
    gd    mean log p(forget) − weight · mean log p(retain)
    npo   −(2/β) mean log σ(−β log p(forget)/p₀(forget)) − weight · mean log p(retain)
    rmu   mean ‖h(forget) − c·u‖² + weight · mean ‖h(retain) − h₀(retain)‖²,   u random, h a block's output

Papers: gradient ascent and difference as in TOFU (arXiv 2401.06121), NPO 2404.05868, RMU 2403.03218. p₀ and h₀ are the
model's before. log p is a whole record's in npo's first term, per token elsewhere. rmu trains the projections that end
the feed-forward layers of its block and of the two before it, and c is `steer` × the mean ‖h₀(forget)‖ (2408.06223).
What differs: rates are over a weight's root mean square; the weights are not the authors' (1, and rmu 1200, which moved
nothing here) but were chosen on the zoo's language model; and training goes in `checks` rounds, each with AdamW anew.
After each a fifth of the retain set, which is not trained on, is asked: if its perplexity rose beyond `collapse`, the
round is taken back and training ends; if it was the first, the run is refused. It also ends when at most `enough` of
the forget set is still said, by greedy text where records have a prompt and a causal model answers.

That a thing is not said is not that it is gone: other wordings, of which facts' paraphrases are asked and told of, or a
few steps of training may bring it back. On the zoo's model, training on half of the forgotten facts brought back .46 of
the other half after rmu, and .08 after npo.

Models: any with a task for the records. The result is a checkpoint. Errors: EditError; DataError; DivergedError.

    lfm run edit.unlearn model=base forget=forget.jsonl retain=retain.jsonl --out forgetful
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import MismatchError
from lfm.core.heavy import torch
from lfm.data import task as tasks
from lfm.editing import forgetting
from lfm.editing.forgetting import FORGET, RETAIN, part
from lfm.models import device, forward, structure
from lfm.train import Fit, fit
from lfm.train.fit import steps_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch
    from lfm.data.records import Record

WEIGHT = {"npo": 5.0, "gd": 5.0, "ga": 0.0, "rmu": 30.0}
RATE = {"rmu": 20.0}
"""Of rmu, over the others': it trains few matrices, and pulls at them by a distance."""

Loss = Callable[["nn.Module", "Batch"], "Tensor"]


class Config(Fit, frozen=True):
    loss: Annotated[Literal["npo", "gd", "ga", "rmu"], Meta(description="what is minimised")] = "npo"
    beta: Annotated[float, Meta(gt=0, description="β of npo: how soon a forgotten record pulls no more")] = 0.1
    weight: Annotated[
        Annotated[float, Meta(ge=0)] | None, Meta(description="of the retain set's term; none: 5, for rmu 30")
    ] = None
    layer: Annotated[int | None, Meta(description="block that rmu steers; none: half way up")] = None
    steer: Annotated[float, Meta(gt=0, description="length that rmu steers to, over the mean before")] = 5.0
    checks: Annotated[int, Meta(ge=1, description="rounds that the steps are made in")] = 8
    enough: Annotated[float, Meta(ge=0, lt=1, description="share of the forget set still said at which it ends")] = 0.05
    collapse: Annotated[float, Meta(gt=1, description="most that the retain perplexity may be multiplied by")] = 1.2
    steps: Annotated[int, Meta(ge=0, description="most optimizer steps; 0: as many as `epochs` asks")] = 0
    epochs: Annotated[float, Meta(gt=0, description="passes over the larger set, where steps is 0")] = 8.0
    lr: Annotated[float, Meta(gt=0, description="AdamW's rate over a weight's root mean square; rmu: 20 times it")] = (
        1e-3
    )
    weight_decay: Annotated[float, Meta(ge=0, description="decoupled weight decay, of matrices only")] = 0.0
    warmup: Annotated[float, Meta(ge=0, lt=1, description="share of a round in which the rate rises")] = 0.0
    schedule: Annotated[
        Literal["cosine", "linear", "constant"], Meta(description="how the rate falls within a round")
    ] = "constant"


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    codec, facts = model.ask(Codec), model.facts
    forget, retain = (tasks.fit(inputs.records(role), codec, facts) for role in ("forget", "retain"))
    retain, probe = forgetting.parted(retain, run)
    module = model.ask(Gradients).module().to(device())
    loss = losses(config, module, model, forget, retain, run)
    measure = forgetting.measurer(module, model, {"forget": forget, "retain": probe})
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    factor = RATE.get(config.loss, 1.0)
    sizes = {n: factor * (float(p.detach().double().square().mean().sqrt()) or 1.0) for n, p in trained.items()}
    pairs = range(max(len(forget), len(retain)))
    whole = steps_of(config, len(pairs))
    rounds = min(config.checks, whole)
    how = msgspec.structs.replace(config, steps=-(-whole // rounds))
    collate = forgetting.collator(codec, facts, forget, retain)

    def train(number: int) -> None:
        fit(module, pairs, collate, loss, how, run, name=f"round {number}", scale=sizes.__getitem__)

    hint = f"lr={config.lr / 10:.0e}, more checks, {'loss=npo, ' * (config.loss in ('ga', 'gd'))}or a larger weight"
    forgetting.by_rounds(trained, train, measure, rounds, run, enough=config.enough, collapse=config.collapse, fix=hint)
    return model.ask(Gradients).rewrap(module)


def losses(
    config: Config, module: nn.Module, model: Model, forget: Sequence[Record], retain: Sequence[Record], run: Run
) -> Loss:
    """The loss of a batch of both; parameters that it does not train need no gradient after this."""
    codec, facts = model.ask(Codec), model.facts
    shifted = facts.task == "causal-lm"
    task, other = (tasks.task_for(records, codec, facts) for records in (forget, retain))
    weight = WEIGHT[config.loss] if config.weight is None else config.weight
    before = model.ask(Gradients).module().to(device()).requires_grad_(False) if config.loss in ("npo", "rmu") else None

    def said(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return forgetting.told(task, forward(module, batch), batch, shifted=shifted)

    def by_words(module: nn.Module, batch: Batch) -> Tensor:
        module.eval()  # p₀ is told without dropout
        now, counts = said(module, part(batch, FORGET))
        if before is None:
            lost = forgetting.ascent(now, counts)
        else:
            with torch.no_grad():
                then, _ = said(before, part(batch, FORGET))
            lost = forgetting.npo(now, then, config.beta)
        if config.loss == "ga" or not weight:
            return lost
        kept = part(batch, RETAIN)
        return lost + weight * other.loss(forward(module, kept), kept)

    if config.loss != "rmu":
        return by_words
    assert before is not None
    stack = structure.blocks(module)
    block = (len(stack) // 2 if config.layer is None else config.layer) % len(stack)
    ends = [structure.feed_forward(module, name).down for name in stack[max(0, block - 2) : block + 1]]
    module.requires_grad_(False)
    for name in ends:
        module.get_submodule(name).weight.requires_grad_(True)  # type: ignore[union-attr]
    norm, width = run.step("mean length", lambda: forgetting.length(before, task, forget, block, config.batch_size))
    to = forgetting.target(int(width), config.steer * norm, run.generator("direction")).to(device())
    run.note(layer=block, length_before=norm)

    def by_activations(module: nn.Module, batch: Batch) -> Tensor:
        module.eval()
        lost, kept = part(batch, FORGET), part(batch, RETAIN)
        with torch.no_grad():
            was = forgetting.hidden(before, kept, block)
        gone = forgetting.apart(forgetting.hidden(module, lost, block), to, lost.get("attention_mask"))
        moved = forgetting.apart(forgetting.hidden(module, kept, block), was, kept.get("attention_mask"))
        return gone + weight * moved

    return by_activations


def agree(config: Config, inputs: Inputs) -> None:
    facts = inputs.model("model").facts
    if config.layer is not None and facts.layers and not -facts.layers <= config.layer < facts.layers:
        raise MismatchError(f"there is no block {config.layer}", why=f"the model has {facts.layers}, counted from 0")
    forgetting.agree(inputs.records("forget"), inputs.records("retain"))


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, forget, retain = sizes.model("model"), sizes.data["forget"], sizes.data["retain"]
    steps = steps_of(config, max(forget.records, retain.records))
    tokens = config.batch_size * (forget.tokens / max(1, forget.records) + retain.tokens / max(1, retain.records))
    passes = 8.0 if config.loss in ("npo", "rmu") else 6.0
    asked = (config.checks + 1) * (forget.tokens + retain.tokens / 5)
    return Cost(
        flops=facts.parameters * (passes * tokens * steps + 2.0 * asked),
        steps=3 * steps,
        memory=int(4 * facts.parameters * (6 if passes > 6 else 5) + 12 * tokens * facts.vocabulary),
        disk=facts.bytes,
    )


RECORDS = ("text", "completion", "label", "pair", "image", "fact")

METHOD = Method(
    paper="arXiv:2404.05868",
    config=Config,
    models={"model": Slot((Gradients, Codec), help="what is to forget")},
    data={
        "forget": DataSlot(Data.FEW_SHOT, RECORDS, help="what is to be forgotten"),
        "retain": DataSlot(Data.FEW_SHOT, RECORDS, help="what is to stay; a fifth is held out to watch"),
    },
    run=run,
    cost=cost,
    agree=agree,
    forms=("checkpoint",),
)
