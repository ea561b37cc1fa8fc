"""Index the blocks of a LoRA by the keys of edits: where an edit reaches, and nowhere else, its block is added.

    W x + s B_g(i) A_g(i) x   at tokens with ‖k − k_i‖ ≤ ε_i for the nearest key k_i,   W x otherwise
    A_g, B_g = argmin −Σ log p(new object | prompt) over the edits i of block g

Paper: MELO, arXiv 2312.11795. k is what the projection ending one block's feed-forward layer reads; the LoRA changes
that projection and the next `depth` − 1 blocks' feed-forward layers; `share` edits have one block of `rank` together.
What differs: as in edit.grace the first radius is a share of the distance to the nearest of 32 prompts with another
subject, ε is a function of the set of edits (the authors' clusters have moving centres, and lose keys when they split),
the block of keys is found by trying, and keys are looked up at every token (theirs: once a text, for all its tokens),
so that cached, uncached and scored text agree; a LoRA block is trained at the prompts' last tokens alone. Forgetting an
edit takes its key; its LoRA block goes with the last of the edits that have it.

Model: a causal language model. The result is a program, which stores a key and a radius for each edit, and the LoRA.
`memory=` adds to an earlier one; with `forget=true` the edits go out of it. Notes are of greedy text. Errors: EditError
for an edit that does not hold (refused or, with on_failure=skip, left out), and where other text suffers; DataError.

    lfm run edit.melo model=base edits=edits.jsonl --out indexed
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Kept, Meta, Method, Model, Parts, Run, Sizes, Slot
from lfm.core.errors import EditError, MismatchError, SlotError
from lfm.core.heavy import nn, torch
from lfm.editing import indexed, outcome, recall, rows, setting, settled
from lfm.editing.choose import candidates
from lfm.editing.indexed import Blocks
from lfm.models import device, forward, local, structure
from lfm.models.program import program
from lfm.train import Fit, fit

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.data.records import Edit
    from lfm.editing.setting import Setting


class Config(recall.Recall, frozen=True):
    layer: Annotated[int | None, Meta(description="block of keys, from 0; none: try them on the first edits")] = None
    depth: Annotated[int, Meta(ge=1, description="blocks whose feed-forward layers change, from that one on")] = 2
    rank: Annotated[int, Meta(ge=1, description="rank of a block")] = 4
    share: Annotated[int, Meta(ge=1, description="edits that have one block together")] = 4
    lora_lr: Annotated[float, Meta(gt=0, description="Adam's rate on a block, whose A has entries of about 1")] = 0.3
    prefixes: Annotated[int, Meta(ge=1, description="texts of its own before a prompt, to try a block")] = 8
    tokens: Annotated[int, Meta(ge=1, description="tokens of text that pieces are taken from")] = 4096
    collapse: Annotated[float, Meta(gt=1, description="most that perplexity on other text may be multiplied by")] = (
        outcome.COLLAPSE
    )
    on_failure: Annotated[
        outcome.OnFailure, Meta(description="an edit that fails ends the run, or is left out and told of")
    ] = "refuse"
    forget: Annotated[bool, Meta(description="take the edits out of the memory, by prompt and new object")] = False


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model, edits = inputs.model("model"), [] if config.forget else list(inputs.records("edits"))
    before = settled.earlier(model, inputs.all("memory"), Blocks)
    here = setting.opened(model, inputs.records("text"), run, prefixes=config.prefixes, tokens=config.tokens)
    block = before.block if before else config.layer
    if block is None:
        block = recall.chosen(config, here, edits, run)
    block %= len(structure.blocks(here.module))
    none = torch.zeros(0)
    kept = before or Blocks(model.digest, block, (), none, none, none, {}, {})
    failures: list[EditError] = []
    if config.forget:
        kept = indexed.forget(kept, *inputs.records("edits"))
    for start in run.track(range(0, len(edits), config.share), "blocks"):
        some = edits[start : start + config.share]
        learned = run.step(f"edits {start}", partial(learn, config, here, kept, some, f"edits {start}", run))
        probabilities = learned["probability"].tolist()
        for probability in probabilities:
            run.curve("p(new object) with its block", probability)
        good = []
        for i, edit in enumerate(some):
            if probabilities[i] >= config.accept and learned["radii"][i] > 0:
                good.append(i)
                continue
            why = f"its block gives p({edit.new_object}) = {probabilities[i]:.2f} (accept {config.accept:g})"
            failures.append(recall.failure(edit, block, why))
        number = torch.zeros(len(some), dtype=torch.long)
        more = Blocks(
            kept.base, block, tuple(some), learned["keys"], learned["radii"], number, learned["down"], learned["up"]
        )
        kept = indexed.learn(kept, indexed.taken(more, good))
    kept = settled.settled(
        here,
        kept,
        edits,
        failures,
        outcome.Held(collapse=config.collapse, on_failure=config.on_failure),
        run,
        attach=indexed.attach,
        forget=indexed.forget,
        fix="a smaller radius, or another layer",
    )
    run.note(blocks=int(kept.number.max()) + 1 if kept.edits else 0)
    return program("edit.melo", config, kept.parts(model), open)


def learn(config: Config, here: Setting, kept: Blocks, edits: Sequence[Edit], name: str, run: Run) -> dict[str, Any]:
    """A block that makes these edits be said, each at its prompt's last token; their keys, radii, and p(new object)."""
    depth = (len(kept.down) + 1) // 2 if kept.down else config.depth
    names = indexed.layers_of(here.module, kept.block, depth)  # in one order, whatever was read from files before
    asked = recall.asked(here.codec.tokenizer, edits)
    layers = {name: here.module.get_submodule(name) for name in names}
    home = next(here.module.parameters()).device
    at = torch.arange(len(edits), device=home), asked.last.to(home)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hooked(change: Callable[[str, Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def hook(name: str) -> Any:
            return lambda _, args, out: change(name, args[0], out)

        hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
        return partial(indexed.remove, hooks)

    def watch(name: str, x: Tensor, out: Tensor) -> Tensor:
        seen[name] = (x[at].float(), out[at].float())
        return out

    off = hooked(watch)
    with torch.no_grad():
        forward(here.module, asked.batch)
    off()
    random = run.generator(name)
    trained = nn.ParameterDict()
    unit: dict[str, float] = {}
    for place, (x, out) in enumerate(seen[name] for name in names):
        trained[f"down {place}"] = nn.Parameter(torch.randn(config.rank, x.shape[1], generator=random).to(home))
        trained[f"up {place}"] = nn.Parameter(torch.zeros(out.shape[1], config.rank, device=home))
    for name_of, (x, out) in seen.items():
        # what A says is of size 1, and B is measured by what the layer writes
        unit[name_of] = float(out.square().mean().sqrt() / x.norm(dim=1).mean().clamp(min=1e-30))

    def told() -> Tensor:
        def change(name: str, x: Tensor, out: Tensor) -> Tensor:
            place = names.index(name)
            more = x[at] @ trained[f"down {place}"].T @ trained[f"up {place}"].T * unit[name]
            return out.index_put(at, more.to(out.dtype), accumulate=True)

        off = hooked(change)
        try:
            return recall.answer_logprobs(forward(here.module, asked.batch), asked.labels)
        finally:
            off()

    lengths = (asked.labels != rows.IGNORED).sum(1).to(home)
    how = Fit(steps=config.steps, lr=config.lora_lr, weight_decay=0.0, warmup=0.0, schedule="linear", clip=0.0)
    fit(trained, [0], lambda _: {}, lambda *_: -(told() / lengths).mean(), how, run, name=f"train {name}")
    with torch.no_grad():
        probability = told().exp().cpu()
    return {
        "down": {name: trained[f"down {i}"].detach().cpu()[None] for i, name in enumerate(names)},
        "up": {name: (trained[f"up {i}"].detach() * unit[name]).cpu()[None] for i, name in enumerate(names)},
        "keys": recall.keys_of(here.module, here.codec, kept.block, [edit.prompt for edit in edits]),
        "radii": torch.tensor([config.radius * recall.nearest(here, kept.block, edit, run) for edit in edits]),
        "probability": probability,
    }


def open(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The interfaces of the program: those of the model with the blocks, and the blocks themselves."""
    model, kept = parts.model("model"), indexed.opened(parts)

    def built() -> nn.Module:
        module = model.ask(Gradients).module().to(device())
        indexed.attach(module, kept)
        return module

    gives = dict(local.interfaces(model.facts.task, built, lambda: model.ask(Codec)))
    return gives | {Codec: lambda: model.ask(Codec), Blocks: lambda: kept}


def agree(config: Config, inputs: Inputs) -> None:
    given = inputs.all("memory")
    rows.agree(inputs.records("edits"))
    if config.forget and not given:
        raise SlotError("edit.melo has nothing to forget from", fix="add memory=REF")
    if given and config.layer is not None:
        raise SlotError("edit.melo takes either memory or layer", why="the memory's edits are of one block")
    facts = inputs.model("model").facts
    if facts.task != "causal-lm":
        raise MismatchError(
            f"edit.melo edits causal language models; {inputs.model('model').ref} is none",
            why=f"its task is {facts.task or 'not known'}",
            fix="give a causal language model, or change the facts by tune.lora",
        )
    if config.layer is not None and facts.layers and not -facts.layers <= config.layer < facts.layers:
        raise MismatchError(f"there is no block {config.layer}", why=f"the model has {facts.layers}, counted from 0")


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, edits = sizes.model("model"), sizes.data["edits"]
    tried = len(candidates(facts.layers + 1)) if config.layer is None and facts.layers else 0
    prompt = 8 + edits.tokens // max(1, edits.records)
    searches = edits.records + tried * min(recall.TRIED, edits.records)
    a_prompt = 2.0 * facts.parameters * prompt
    blocks = -(-edits.records // config.share)
    return Cost(
        flops=searches * a_prompt * (3 * config.steps + recall.RIVALS) + 2.5 * facts.parameters * config.tokens,
        steps=(blocks + tried) * 2 * config.steps,
        memory=4 * facts.parameters + 24 * prompt * max(config.share, recall.RIVALS) * facts.vocabulary,
        disk=16 * facts.width * edits.records + 40 * facts.width * config.rank * blocks * config.depth,
    )


METHOD = Method(
    paper="arXiv:2312.11795",
    config=Config,
    models={
        "model": Slot((Gradients, Codec), help="the causal language model to edit"),
        "memory": Slot((Blocks,), min=0, help="what edit.melo made of it before, to add to or to forget from"),
    },
    data={
        "edits": DataSlot(Data.FEW_SHOT, ("edit",), help="facts to change, or to forget"),
        "text": DataSlot(Data.UNLABELED, ("text",), optional=True, help="running text: other subjects, perplexity"),
    },
    run=run,
    cost=cost,
    agree=agree,
    open=open,
    forms=("program",),
    kept=Kept(Blocks, indexed.learn, indexed.taken, keys=attrgetter("keys")),
)
