"""Train several students at once, each on the labels and on what the others answer: no teacher is needed.

    L_k = CE(y, p_k) + β/(K − 1) Σ_{j≠k} T² KL(p_j,T ‖ p_k,T)

Paper: Deep mutual learning, arXiv 1706.00384 (β = T = 1 there, the defaults). Differs: the peers step together, each on
what the others answered before that step, where the paper takes turns within a batch; a step of AdamW takes the mean of
the L_k, and clips their gradient as a whole. The others' answers are targets: no gradient passes through them. Peers
may be of different architectures; for several of one, give its reference as often, with start=random: each begins with
weights of its own. One peer is given: the best on `dev`, or else the first.

Measured (docs/distilling.md): two small ViTs on 300 digits came to no more together than alone: .919 right against
.922, a held-out loss of .259 against .264, well within what seeds differ by.

Models: student, two or more (Gradients, Codec): language models of one vocabulary, or classifiers of the same classes,
each reading the records its own way. Data: `train`, as the task of every kind of records; `dev`, held out, chooses the
peer, and is what `patience` looks at. The result is that peer's checkpoint; the run's notes hold every peer's loss.
Errors: MismatchError where peers answer different questions; ConfigError where they begin as one; DivergedError.

    lfm run distill.online student=one student=two train=texts.jsonl --out taught
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Logits, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import ConfigError
from lfm.core.heavy import nn
from lfm.data import task as tasks
from lfm.distilling import lesson as lessons
from lfm.distilling.student import Taught, formed, smaller
from lfm.distilling.telling import TOLD, gap, hard
from lfm.distilling.together import answer, read_by, read_by_all
from lfm.models import forward
from lfm.train import fit, suited, training
from lfm.train.examine import examiner

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch


class Config(Taught, frozen=True):
    temperature: Annotated[float, Meta(gt=0, description="T, of all peers' answers")] = 1.0
    beta: Annotated[float, Meta(ge=0, description="weight of the others' answers against the labels'")] = 1.0


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    peers, dev = inputs.all("student"), inputs.records("dev")
    first, records = peers[0], inputs.records("train")
    read = [lessons.lesson([*records, *dev], peer, first) for peer in peers]
    task, numbers = read[0].task, read[0].numbers
    own = len(tasks.fit(records, first.ask(Codec), first.facts))
    shown = [replace(one, collate=one.theirs) for one in read]
    begun = [formed(p.ask(Gradients).module(), config, run, k, lesson=shown[k]) for k, p in enumerate(peers)]
    # no list: those are stacks of blocks, where blocks are looked for
    modules = nn.ModuleDict({str(k): module for k, module in enumerate(begun)})

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        each_of = [module.get_submodule(str(k)) for k in range(len(peers))]
        told = [answer(forward(peer, read_by(batch, k, read)), read[k]) for k, peer in enumerate(each_of)]
        scored = [task.scored(logits, batch) for logits in told]
        each = [hard(*one) for one in scored]
        total = sum(each[1:], each[0])
        if module.training and config.beta:
            for k, (mine, _) in enumerate(scored):
                for j, (theirs, _) in enumerate(scored):
                    if j != k:
                        apart = gap(mine, {TOLD: theirs.detach()}, config.temperature)
                        total = total + config.beta * apart / (len(peers) - 1)
        return total / len(peers)

    losses = fit(modules, numbers[:own], read_by_all(read), loss, config, run, dev=numbers[own:])
    run.note(loss_before=losses[0], loss_after=losses[-1])
    chosen = 0
    if len(dev):
        modules.eval()
        found = [examiner(dev, p)(lambda batch, m=m: forward(m, batch)).loss for p, m in zip(peers, modules.values())]
        run.note(**{f"dev loss {k}": value for k, value in enumerate(found)})
        chosen = found.index(min(found))
    run.note(chosen=chosen)
    return peers[chosen].ask(Gradients).rewrap(modules[str(chosen)])


def agree(config: Config, inputs: Inputs) -> None:
    suited(config, inputs)
    peers = inputs.all("student")
    for peer in peers[1:]:
        lessons.agree(peer, peers[0])
    if config.start == "weights" and len({peer.ref for peer in peers}) < len(peers):
        raise ConfigError(
            "two peers begin with the same weights",
            why="what answers alike teaches nothing",
            fix="start=random, or peers that were trained apart",
        )


def cost(config: Config, sizes: Sizes) -> Cost:
    each = [training(config, smaller(config, facts), sizes.data["train"]) for facts in sizes.models["student"]]
    return each[0]._replace(
        flops=sum(one.flops for one in each),
        memory=sum(one.memory for one in each),
        disk=sum(one.disk for one in each),
    )


METHOD = Method(
    paper="arXiv:1706.00384",
    config=Config,
    models={
        "student": Slot(
            (Gradients, Codec),
            also=(Logits,),  # each is the others' teacher
            min=2,
            max=None,
            help="the peers; the first, or the best, is given",
        )
    },
    data={
        "train": DataSlot(
            Data.FEW_SHOT,
            ("text", "completion", "label", "pair", "image", "audio", "fact"),
            help="what they learn, with its labels",
        ),
        "dev": DataSlot(
            Data.FEW_SHOT,
            ("text", "completion", "label", "pair", "image", "audio", "fact"),
            optional=True,
            help="held out: chooses the peer that is given; for patience",
        ),
    },
    forms=("checkpoint",),
    run=run,
    cost=cost,
    agree=agree,
)
