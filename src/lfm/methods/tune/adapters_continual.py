"""Learn task after task, each in an adapter of its own beside a frozen base, and send every input to the one it is for.

    f(x) = base + adapter_t(x),   t(x) = argmax_t  μ_tᵀ Σ⁻¹ z − ½ μ_tᵀ Σ⁻¹ μ_t,   z = mean over tokens of the last block
    Σ = (1 − ε) S/n + ε s I,  S the scatter of z around its own task's mean μ_t, s the mean of S/n's diagonal

Papers: adapters per task and learned routing, Modular Deep Learning, arXiv 2302.11529; an adapter is LoRA's
(2106.09685) on all linear layers of the blocks, with a head of its own where the base has one; the router is linear
discriminant analysis on the base's features, kept as means, counts and one matrix as in streaming LDA (1909.01520), so
that a task is added without the others' data. Asked as a task (`model.ask(Adapters).task(name)`, an adapter that can be
saved by itself), the answers never change once learned: nothing that they depend on is trained again. Routed, they
change only where an input goes elsewhere since a task was added; `routing_accuracy` is that of the training inputs.
Differs: a decoder is routed by its prompt alone, so that no later token is looked at.

Models: base, of any task, with blocks found by structure; earlier, optional: a program that this method made over that
base, whose tasks are kept. Data: `train`, records whose group is their task. The result is a program over the base; it
stores the adapters and the router, and holds one copy of the base. Errors: MismatchError for a program over another
base; DataError for a task that is learned already; DivergedError.

    lfm run tune.adapters_continual base=base train=tasks.jsonl --set rank=4 --out taught
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, final

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Model, Parts, Run, Sizes, Slot
from lfm.core.errors import DataError
from lfm.core.heavy import torch
from lfm.data import task as tasks
from lfm.data.records import Text
from lfm.data.shares import by_group, tasks_of, unlearned
from lfm.data.wording import wording
from lfm.models import adapter, device, dispatch, forward
from lfm.models.program import program
from lfm.tensors.discriminant import Router, routed
from lfm.train import Fit, fit, once, seeded, suited, training

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch
    from lfm.data.records import Record

READ = 32
"""Records whose features are taken at once."""


class Config(Fit, frozen=True):
    rank: Annotated[int, Meta(ge=1, description="r of each task's adapter")] = 8
    alpha: Annotated[int, Meta(gt=0, description="α: ΔW is scaled by α/r")] = 16
    weight_decay: Annotated[float, Meta(ge=0, description="decoupled weight decay, of matrices only")] = 0.0


@final
@dataclass(frozen=True)
class Adapters:
    """What a program of this method gives beside its answers: its tasks, by name, each an adapter over the base."""

    base: Model
    names: tuple[str, ...]
    settings: tuple[Mapping[str, Any], ...]
    tensors: Mapping[str, Tensor]

    def of(self, place: int) -> dispatch.Beside:
        found = {k.split("/", 2)[2]: v for k, v in self.tensors.items() if k.startswith(f"task/{place}/")}
        return dispatch.Beside(self.settings[place], found)

    def task(self, name: str) -> Model:
        """The base as it answers this task. DataError for a name that no task has."""
        if name not in self.names:
            raise DataError(f"no task {name!r} was learned", why=f"the tasks are {', '.join(map(repr, self.names))}")
        settings, tensors = self.of(self.names.index(name))
        config = {**settings, "peft_type": "LORA", "task_type": adapter.TASK_TYPES.get(self.base.facts.task)}
        config["base_model_name_or_path"] = self.base.ref
        return adapter.model_of(adapter.Source(f"{name} over {self.base.ref}", self.base, config, lambda: tensors))

    def router(self) -> Router:
        return Router(*(self.tensors[f"router/{part}"] for part in Router._fields))


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    base, groups = inputs.model("base"), by_group(inputs.records("train"))
    earlier = inputs.model("earlier").ask(Adapters) if inputs.all("earlier") else None
    done = len(earlier.names) if earlier else 0
    tensors = dict(earlier.tensors) if earlier else {}
    settings = list(earlier.settings) if earlier else []
    frozen, read = base.ask(Gradients).module().to(device()), []
    for place, (name, records) in enumerate(groups.items(), start=done):
        z = [dispatch.features(frozen, batch) for batch in questions(base, records)]
        read.append(torch.cat(z))
        module = base.ask(Gradients).module()
        settings.append(dispatch.lora(module, config.rank, config.alpha, heads=bool(base.facts.labels)))
        with seeded(run.seed_for("adapter", name)):
            module = dispatch.adapted(module, settings[-1])
        losses = learn(config, module, base, records, run, f"task-{place}")
        run.note(**{f"loss {name}": losses[-1]})
        tensors |= {f"task/{place}/{key}": value for key, value in dispatch.taken(module).items()}
    router = routed(earlier.router() if earlier else None, read)
    right = sum(int((router.choose(z) == place).sum()) for place, z in enumerate(read, start=done))
    run.note(tasks=done + len(groups), routing_accuracy=right / sum(map(len, read)))
    tensors |= {f"router/{part}": value for part, value in router._asdict().items()}
    names = [*(earlier.names if earlier else ()), *groups]
    parts = Parts({"base": (base,)}, tensors, {"tasks": names, "settings": settings})
    return program("tune.adapters_continual", config, parts, open)


def learn(
    config: Config, module: nn.Module, base: Model, records: Sequence[Record], run: Run, name: str
) -> tuple[float, ...]:
    """Train a task's adapter."""
    fitted = tasks.fit(records, base.ask(Codec), base.facts)
    task = tasks.task_for(fitted, base.ask(Codec), base.facts)
    numbers, collate = once(fitted, task.collate)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return task.loss(forward(module, batch), batch)

    return fit(module, numbers, collate, loss, config, run, name=name)


def questions(base: Model, records: Sequence[Record]) -> list[Batch]:
    """What the records ask, as the model reads it before it answers: a decoder's prompt, else the whole input."""
    codec = base.ask(Codec)
    parts = [records[i : i + READ] for i in range(0, len(records), READ)]
    if base.facts.task in ("causal-lm", "seq2seq-lm"):
        return [codec.texts([r.text if isinstance(r, Text) else wording(r).prompt for r in part]) for part in parts]
    task = tasks.task_for(records, codec, base.facts)
    return [task.collate(part) for part in parts]


def open(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The base's interfaces, routed, and the tasks by name."""
    base, state = parts.model("base"), parts.state
    held = Adapters(base, tuple(state["tasks"]), tuple(state["settings"]), parts.tensors)
    sent = dispatch.Dispatch(base, [held.of(i) for i in range(len(held.names))], held.router().choose)
    return dispatch.interfaces(base, sent) | {Adapters: lambda: held}


def agree(config: Config, inputs: Inputs) -> None:
    suited(config, inputs, role="base")
    base, groups = inputs.model("base"), tasks_of(inputs.records("train"), "an adapter")
    for earlier in inputs.all("earlier"):
        held = earlier.ask(Adapters)
        unlearned(base, earlier, held, groups)


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, amount = sizes.model("base"), sizes.data["train"]
    share = min(1.0, 2 * config.rank / max(facts.width, 1))
    whole = training(config, facts, amount, share=share)
    return whole._replace(
        flops=whole.flops + 2.0 * facts.parameters * amount.tokens, disk=int(4 * share * facts.parameters)
    )


METHOD = Method(
    paper="arXiv:2302.11529",
    config=Config,
    models={
        "base": Slot((Gradients, Codec), help="the model that stays as it is"),
        "earlier": Slot((Adapters,), min=0, help="what this method made of that base; its tasks are kept"),
    },
    data={
        "train": DataSlot(
            Data.FEW_SHOT,
            ("text", "completion", "label", "pair", "image", "audio", "fact"),
            help="records grouped by task",
        )
    },
    forms=("program",),
    run=run,
    cost=cost,
    agree=agree,
    open=open,
)
