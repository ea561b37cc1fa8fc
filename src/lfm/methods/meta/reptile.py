"""Move the weights to where a few steps on any task of a kind go far.

    φ_m = k steps of Adam or SGD on task m from θ,      θ ← θ + ε · mean_m (φ_m − θ)

Paper: Reptile, arXiv 1803.02999, its batched form; ε falls linearly to 0, the inner Adam has β₁ = 0. Differs: Adam's
second moments begin anew with each task (the authors' code lets them run on).

Models: any with Gradients and a codec. Data: for a classifier, records with a class: a task is `ways` classes, drawn at
random and numbered at random, so its head must have as many. For others, or with ways=0, a task is one `group` of
records. With `test` (records of other classes or groups) the run notes what `test_steps` steps on `test_shots` examples
reach on further ones, before and after: loss, and of classes accuracy. Errors: MismatchError where the head is too
narrow; DataError for too few classes, groups or examples; DivergedError.

    lfm run meta.reptile model=base train=seen.jsonl test=unseen.jsonl --set ways=3 --set steps=8 --set test_tasks=2 \\
      --out ready
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec

import lfm.core
from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.heavy import torch
from lfm.models import device, forward
from lfm.train import fingerprint, loop, state_of
from lfm.train.episodes import Pool, batch_of, draw, pool, sample
from lfm.train.inner import Rule, adapted, adapted_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

QUERIES = 15
"""Examples a class that an adapted model is tested on, as few-shot papers have it."""


class Config(lfm.core.Config, frozen=True):
    steps: Annotated[int, Meta(ge=1, description="outer steps")] = 500
    tasks: Annotated[int, Meta(ge=1, description="tasks an outer step")] = 5
    ways: Annotated[int, Meta(ge=0, description="classes a task; 0: a task is a group of records")] = 5
    shots: Annotated[int, Meta(ge=1, description="examples a class that a task is trained on")] = 10
    inner_steps: Annotated[int, Meta(ge=1, description="k, steps a task")] = 5
    inner_batch: Annotated[int, Meta(ge=1, description="examples an inner step")] = 10
    inner_lr: Annotated[float, Meta(gt=0, description="learning rate of the inner steps")] = 1e-3
    rule: Annotated[Rule, Meta(description="the inner step: adam (β₁ = 0) or sgd")] = "adam"
    outer_lr: Annotated[float, Meta(ge=0, le=1, description="ε at first; it falls linearly to 0")] = 1.0
    test_shots: Annotated[int, Meta(ge=1, description="examples a class to adapt to when tested")] = 5
    test_steps: Annotated[int, Meta(ge=1, description="steps to adapt when tested")] = 20
    test_tasks: Annotated[int, Meta(ge=1, description="tasks to test on")] = 50
    checkpoint_every: Annotated[float, Meta(ge=0, description="seconds between checkpoints")] = 60.0


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    gradients = model.ask(Gradients)
    records = inputs.records("train")
    ways = config.ways if model.facts.labels else 0
    train = pool(records, model, ways, least=min(config.shots, 2))
    test = pool(inputs.records("test"), model, ways, least=config.test_shots + 1) if inputs.records("test") else None
    module = gradients.module().to(device())
    if test:
        before = run.step("before", lambda: trial(module, test, config, run))
        run.note(**{f"test_{name}_before": value for name, value in before.items()})
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def advance(step: int) -> Tensor:
        batch = sample(
            train, config.tasks, config.shots, config.inner_steps, config.inner_batch, run.generator("tasks", step)
        )
        mean, first = adapted_mean(module, train.loss, batch, config.inner_lr, config.rule)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.lerp_(mean[name], config.outer_lr * (1 - step / config.steps))
        return first

    module.train()
    losses = loop(
        advance,
        config.steps,
        state_of(module, fingerprint(module, msgspec.structs.replace(config, checkpoint_every=0.0), len(records))),
        run,
        name="reptile",
        every=config.checkpoint_every,
        remedy=lambda step: f"inner_lr={config.inner_lr / 10:.0e} (it was {config.inner_lr:.0e})",
    )
    module.eval()
    run.note(loss_before=losses[0], loss_after=losses[-1])
    if test:
        run.note(**{f"test_{name}_after": value for name, value in trial(module, test, config, run).items()})
    return gradients.rewrap(module)


def trial(module: nn.Module, test: Pool, config: Config, run: Run) -> dict[str, float]:
    """What adapting to a few examples reaches on further ones, mean over tasks; the module is left as it was."""
    trained = [p for p in module.parameters() if p.requires_grad]
    shots = test.keys * config.test_shots
    totals: dict[str, float] = {}
    for number in run.track(range(config.test_tasks), "test"):
        examples = draw(test, config.test_shots + QUERIES, run.generator("test", number))
        seen, asked = batch_of(test, examples[:shots]), batch_of(test, examples[shots:])
        steps = [lambda seen=seen: test.loss(module, seen)] * config.test_steps
        with adapted(trained, steps, config.inner_lr, config.rule), torch.no_grad():
            found = {"loss": test.loss(module, asked).item()}
            if test.ways:
                guessed = forward(module, asked)[:, : test.ways].argmax(-1).cpu()
                found["accuracy"] = (guessed == asked["labels"]).double().mean().item()
        for name, value in found.items():
            totals[name] = totals.get(name, 0.0) + value / config.test_tasks
    return totals


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, train = sizes.model("model"), sizes.data["train"]
    examples = config.steps * config.tasks * config.inner_steps * config.inner_batch
    if "test" in sizes.data:
        examples += 2 * config.test_tasks * config.test_steps * config.test_shots * max(config.ways, 1)
    length = max(1.0, train.tokens / max(train.records, 1))
    return Cost(
        flops=6.0 * facts.parameters * examples * length,
        steps=config.steps * config.tasks * config.inner_steps,
        memory=4 * facts.parameters * (5 + config.tasks),
        disk=8 * facts.parameters,
    )


METHOD = Method(
    paper="arXiv:1803.02999",
    config=Config,
    models={"model": Slot((Gradients, Codec), help="the model to make quick to adapt")},
    data={
        "train": DataSlot(
            Data.LABELED,
            ("image", "label", "pair", "text", "completion", "fact"),
            help="many classes, or many groups, with a few examples each",
        ),
        "test": DataSlot(
            Data.FEW_SHOT,
            ("image", "label", "pair", "text", "completion", "fact"),
            optional=True,
            help="classes or groups that are not in train, to measure on",
        ),
    },
    run=run,
    cost=cost,
)
