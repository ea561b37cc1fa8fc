"""Learn one task after another, replaying what was seen from compressed features of a frozen half of the model.

    x → z = G(x), G the frozen early blocks;   z ≈ decode(code), a byte a slice and place (product quantisation)
    a step's loss: Σ_new CE(F(z), y) + Σ_replayed [λ CE(F(z̃), y_a) + (1 − λ) CE(F(z̃), y_b)], over their number
    z̃ = λ z_a + (1 − λ) z_b of two remembered examples, λ ~ Beta(`mixup`, `mixup`)

Paper: REMIND, arXiv 1910.02509; settings as in the authors' ImageNet run (32 codebooks of 256, 50 replayed, Beta(.1)).
New examples go through the code too, as the paper has it, so that F sees one kind of features. Differs: records of one
group are one task; within a task they are shuffled and learned in batches (`batch_size=1, epochs=1` is the paper's
stream), and a task can be replayed once it is over; AdamW; features are not cropped at random; and the result is an
ordinary model, whose G hands features over as they are rather than quantised.

Models: classifiers of images whose blocks are found by structure; the early blocks, all but `plastic`, stay as
they are with the embeddings. Data: `train`, labelled records whose group is their task, in the order that tasks first
appear; `known`, optional: records of what the model can do already, to learn the codebooks from and to replay. Without
them the codebooks are those of the first task. A full memory drops an example of the class that has the most. Errors:
MismatchError for another model; ConfigError where slices do not divide the width; DivergedError.

    lfm run tune.remind model=base train=images.jsonl --set codebooks=4 --set codewords=16 --out taught
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import ConfigError, MismatchError
from lfm.core.heavy import F, torch
from lfm.core.method import Amount
from lfm.data import task as tasks
from lfm.data.shares import by_group
from lfm.models import device
from lfm.models.halves import Half, halved, handed, plastic
from lfm.tensors import codebooks
from lfm.train import Fit, fit, suited, training
from lfm.train.replay import Seen, remembered

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch
    from lfm.data.records import Record
    from lfm.data.task import Task

BATCH = 64
"""Records a forward of the frozen half."""
DRAWN = 2**16
"""Features that codebooks are learned from, at most."""


class Config(Fit, frozen=True):
    plastic: Annotated[int, Meta(ge=1, description="blocks at the end that learn, with the head")] = 1
    codebooks: Annotated[int, Meta(ge=1, description="slices that a feature is cut into, a byte each")] = 32
    codewords: Annotated[int, Meta(ge=1, le=256, description="codewords a slice")] = 256
    replay: Annotated[int, Meta(ge=1, description="mixtures of remembered examples in each step")] = 50
    mixup: Annotated[float, Meta(ge=0, description="of the Beta that λ is drawn from; 0: no mixing")] = 0.1
    memory: Annotated[int, Meta(ge=0, description="examples remembered; 0: all")] = 0
    epochs: Annotated[float, Meta(gt=0, description="passes over each task's records, where steps is 0")] = 1.0


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    known, groups = inputs.records("known"), by_group(inputs.records("train"))
    task = tasks.task_for(inputs.records("train"), model.ask(Codec), model.facts)
    module = model.ask(Gradients).module().to(device())
    half = halved(module, config.plastic, _blank(task, inputs.records("train")[:1]))
    start = features(half, task, known or next(iter(groups.values())))
    books = run.step("codebooks", lambda: learned(config, start, run))
    memory = seen(half, task, known, books) if known else None
    for place, records in enumerate(groups.values()):
        new = seen(half, task, records, books)
        collate = collated(config, new, memory)
        losses = fit(module, range(len(records)), collate, loss_of(half, books), config, run, name=f"task-{place}")
        run.note(**{f"loss_{place}": losses[-1]})
        memory = remembered(memory, new, config.memory, run.generator("memory", place))
    assert memory is not None
    run.note(tasks=len(groups), remembered=len(memory.labels), memory_bytes=memory.codes.nbytes + books.nbytes)
    return model.ask(Gradients).rewrap(module.requires_grad_(True))


def _blank(task: Task, record: Sequence[Record]) -> Batch:
    return {name: tensor for name, tensor in task.collate(record).items() if name != "labels"}


def features(half: Half, task: Task, records: Sequence[Record]) -> Tensor:
    """z = G(x) of the records, (n, places, width), on the CPU."""
    found = []
    for start in range(0, len(records), BATCH):
        found.append(handed(half, task.collate(records[start : start + BATCH])).cpu())
    return torch.cat(found)


def learned(config: Config, start: Tensor, run: Run) -> Tensor:
    """The codebooks of features (n, places, width). ConfigError where the slices do not divide the width."""
    vectors = start.flatten(0, 1)
    if vectors.shape[1] % config.codebooks:
        whole = [m for m in range(1, vectors.shape[1] + 1) if vectors.shape[1] % m == 0]
        nearest = min(whole, key=lambda m: abs(m - config.codebooks))
        raise ConfigError(
            f"{config.codebooks} codebooks do not divide features of {vectors.shape[1]} numbers",
            fix=f"codebooks={nearest}",
        )
    random = run.generator("codebooks")
    if len(vectors) > DRAWN:
        vectors = vectors[torch.randperm(len(vectors), generator=random)[:DRAWN]]
    return codebooks.learn(vectors, config.codebooks, config.codewords, random)


def seen(half: Half, task: Task, records: Sequence[Record], books: Tensor) -> Seen:
    """The records as they are remembered."""
    found = features(half, task, records)
    labels = torch.cat([task.collate(records[i : i + BATCH])["labels"] for i in range(0, len(records), BATCH)])
    return Seen(codebooks.encode(found.flatten(0, 1), books).reshape(*found.shape[:2], -1), labels)


def collated(config: Config, new: Seen, memory: Seen | None) -> Callable[[Sequence[int]], Batch]:
    """New examples by number, with pairs of remembered ones and one λ beside them.

    Draws from torch's own generator, which the training loop seeds by step: the same again after a kill.
    """

    def collate(chosen: Sequence[int]) -> Batch:
        batch = {"codes": new.codes[list(chosen)], "labels": new.labels[list(chosen)]}
        if memory is None:
            return batch
        a, b = torch.randint(len(memory.labels), (2, config.replay))
        share = torch.ones(())
        if config.mixup:
            share = torch.distributions.Beta(torch.tensor(config.mixup), torch.tensor(config.mixup)).sample()
        batch |= {"codes_a": memory.codes[a], "labels_a": memory.labels[a]}
        return batch | {"codes_b": memory.codes[b], "labels_b": memory.labels[b], "share": share}

    return collate


def loss_of(half: Half, books: Tensor) -> Callable[[nn.Module, Batch], Tensor]:
    """The mean over new and replayed examples of F's cross-entropy."""

    def decoded(codes: Tensor) -> Tensor:
        return codebooks.decode(codes.flatten(0, 1).cpu(), books).reshape(*codes.shape[:2], -1).to(device())

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        hidden = decoded(batch["codes"])
        if "share" not in batch:
            return F.cross_entropy(plastic(half, hidden), batch["labels"])
        share, count = batch["share"], len(hidden)
        mixed = share * decoded(batch["codes_a"]) + (1 - share) * decoded(batch["codes_b"])
        told = plastic(half, torch.cat([hidden, mixed]))
        new = F.cross_entropy(told[:count], batch["labels"], reduction="sum")
        a, b = (F.cross_entropy(told[count:], batch[f"labels_{x}"], reduction="sum") for x in "ab")
        return (new + share * a + (1 - share) * b) / len(told)

    return loss


def agree(config: Config, inputs: Inputs) -> None:
    model = inputs.model("model")
    if model.facts.task != "image-classification":
        raise MismatchError(
            "tune.remind keeps features of classifiers of images",
            why=f"{model.ref} is {model.facts.task or 'of no known task'}",
            fix="tune.adapters_continual learns tasks one after another with other models",
        )
    suited(config, inputs)


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, train, known = sizes.model("model"), sizes.data["train"], sizes.data.get("known") or Amount(0, 0)
    share = config.plastic / max(facts.layers, 1)
    step = Amount(train.records, int(train.tokens * (1 + config.replay / config.batch_size)))
    whole = training(config, facts, step, share=share)
    each = train.tokens / max(train.records, 1)
    kept = int((train.records + known.records) * each * config.codebooks)
    return whole._replace(
        flops=whole.flops * share + 2.0 * facts.parameters * (train.tokens + known.tokens), memory=whole.memory + kept
    )


METHOD = Method(
    paper="arXiv:1910.02509",
    config=Config,
    models={"model": Slot((Gradients, Codec), help="the classifier that learns on")},
    data={
        "train": DataSlot(Data.LABELED, ("image",), help="labelled records, grouped by task, in order"),
        "known": DataSlot(Data.LABELED, ("image",), optional=True, help="records of what it can do already"),
    },
    forms=("checkpoint",),
    run=run,
    cost=cost,
    agree=agree,
)
