"""Learn task after task, each in a short prompt of its own before the frozen prompts of the tasks that came earlier.

    y = f([P'_k; P'_{k−1}; …; P'_1; E(x)]),   P'_k = MLP(P_k) + P_k,   P_k and MLP trained, the MLP then dropped

Paper: Progressive Prompts, arXiv 2301.12314, and its code (arazd/ProgressivePrompts: the new prompt stands first; it
begins as random words; two layers with tanh between). Nothing that a task's answers depend on is trained again, so
they never change; a new task reads what the earlier ones learned. Differs: AdamW's rate is 0.03, not 0.3, which the
paper has for T5 (on a small model 0.1 learned less); `hidden` is 256 for its 800; no early stopping. A classifier has
a head of its own for each task.

Models: base, any of text that prompt.soft takes; earlier, optional: what this method made of that base, whose tasks are
kept. Data: `train`, records whose group is their task. The result is a program over the base. Asked as a whole it
answers with the last task's prompt, the longest; `model.ask(Prompts).task(name)` answers as one of the tasks. In the
saved directory tasks/NAME is each of them as a plain PEFT prompt, for lfm and for peft alone. Errors: MismatchError for
a program over another base; DataError for a task that is learned already or has no name; ConfigError where the prompts
fill the context; those of prompt.soft.

    lfm run prompt.progressive base=base train=tasks.jsonl --set prompt_tokens=4 --out taught
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, final

from lfm.core import Codec, Cost, DataSlot, Gradients, Inputs, Meta, Method, Model, Parts, Run, Sizes, Slot
from lfm.core.errors import DataError
from lfm.core.heavy import peft, torch
from lfm.core.interfaces import Adaptation
from lfm.core.method import Data
from lfm.data.shares import by_group, tasks_of, unlearned
from lfm.models import adapter, virtual
from lfm.models.program import program
from lfm.train import seeded, taught
from lfm.tuners import prompts

if TYPE_CHECKING:
    from torch import Tensor

ID = "prompt.progressive"


class Config(prompts.Prompting, frozen=True):
    prompt_tokens: Annotated[int, Meta(ge=1, description="length of each task's own prompt")] = 10
    hidden: Annotated[int, Meta(ge=1, description="units of the MLP, which is dropped")] = 256
    lr: Annotated[float, Meta(gt=0, description="peak learning rate (AdamW)")] = 0.03
    weight_decay: Annotated[float, Meta(ge=0, description="decoupled weight decay, of matrices only")] = 1e-5


@final
@dataclass(frozen=True)
class Prompts:
    """What a program of this method gives beside its answers: its tasks by name, each a prompt over the base.

    tensors: prompt/PLACE (t, d), what that task has added; head/PLACE/NAME, a classifier's head.
    """

    base: Model
    names: tuple[str, ...]
    settings: tuple[Mapping[str, Any], ...]
    tensors: Mapping[str, Tensor]

    def rows(self, count: int) -> Tensor:
        """The prompts of the first `count` tasks, the newest first."""
        return torch.cat([self.tensors[f"prompt/{place}"] for place in reversed(range(count))])

    def task(self, name: str) -> Model:
        """The base as it answers this task, a PEFT prompt. DataError for a name that no task has."""
        if name not in self.names:
            raise DataError(f"no task {name!r} was learned", why=f"the tasks are {', '.join(map(repr, self.names))}")
        place = self.names.index(name)
        heads = {k.split("/", 2)[2]: v for k, v in self.tensors.items() if k.startswith(f"head/{place}/")}
        tensors = {"prompt_embeddings": self.rows(place + 1), **heads}
        config = {**self.settings[place], "base_model_name_or_path": self.base.ref}
        return adapter.model_of(adapter.Source(f"{name} over {self.base.ref}", self.base, config, lambda: tensors))


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    base, groups = inputs.model("base"), by_group(inputs.records("train"))
    earlier = inputs.model("earlier").ask(Prompts) if inputs.all("earlier") else Prompts(base, (), (), {})
    held = Prompts(base, earlier.names, earlier.settings, dict(earlier.tensors))
    for name, records in groups.items():
        held = grown(config, held, name, records, run)
    count = virtual.tokens(held.settings[-1])
    run.note(tasks=len(held.names), prompt_tokens=count)
    state = {"tasks": list(held.names), "settings": [dict(s) for s in held.settings]}
    facts = {"context": virtual.shortened(base.facts, count).context}
    made = program(ID, config, Parts({"base": (base,)}, held.tensors, {**state, "facts": facts}), open)
    return replace(made, formats={"program": partial(_write, made.formats["program"], held)}, _opened={})


def grown(config: Config, held: Prompts, name: str, records: Any, run: Run) -> Prompts:
    """With one more task."""
    from lfm.tuners.growing import Growing

    base, place = held.base, len(held.names)
    before = held.rows(place) if place else None
    whole = config.prompt_tokens + (len(before) if before is not None else 0)
    within = prompts.roomy(base, whole)
    with seeded(run.seed_for("prompt", name)):
        settings = peft.PromptTuningConfig(num_virtual_tokens=whole, num_transformer_submodules=1)
        module = prompts.opened(base, settings)
        begin = prompts.vocabulary_rows(module, config.prompt_tokens, run.generator("words", name))
        encoder = Growing(begin, begin[:0] if before is None else before, config.hidden)
    module.prompt_encoder["default"] = encoder
    prompts.tried(module, within, records)
    losses = taught(module, within, records, config, run, name=f"task-{place}")
    run.note(**{f"loss {name}": losses[-1]})
    made, tensors = adapter.settings_of(module)
    new = {f"prompt/{place}": tensors.pop("prompt_embeddings")[: config.prompt_tokens].clone()}
    new |= {f"head/{place}/{key}": value for key, value in tensors.items()}
    plain = {**adapter.plain(made.to_dict()), "inference_mode": True}
    return Prompts(base, (*held.names, name), (*held.settings, plain), {**held.tensors, **new})


def _write(whole: Callable[[Path], Model | None], held: Prompts, out: Path) -> None:
    """The program, and beside it each task's prompts as a plain PEFT directory."""
    whole(out)
    for place, name in enumerate(held.names):
        safe = name if re.fullmatch(r"\w[\w.-]*", name) else f"task-{place}"
        (out / "tasks" / safe).mkdir(parents=True)
        held.task(name).save(out / "tasks" / safe)


def open(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The interfaces of the last task's prompts, and the tasks by name."""
    names, settings = tuple(parts.state["tasks"]), tuple(parts.state["settings"])
    held = Prompts(parts.model("base"), names, settings, parts.tensors)
    last = held.task(names[-1])
    gives = {kind: opener for kind, opener in last.gives.items() if kind not in (adapter.Stored, Adaptation)}
    return {**gives, Prompts: lambda: held}


def agree(config: Config, inputs: Inputs) -> None:
    base, groups = inputs.model("base"), tasks_of(inputs.records("train"), "a prompt")
    prompts.readable(base, Inputs({"base": (base,)}, inputs.data))
    before = 0
    for earlier in inputs.all("earlier"):
        held = earlier.ask(Prompts)
        before = virtual.tokens(held.settings[-1])
        unlearned(base, earlier, held, groups)
    prompts.room(before + config.prompt_tokens * len(groups), base)


def cost(config: Config, sizes: Sizes) -> Cost:
    width = sizes.model("base").width
    return prompts.cost_of(config, sizes, config.prompt_tokens * width + 2 * width * config.hidden, "base")


METHOD = Method(
    paper="arXiv:2301.12314",
    config=Config,
    models={
        "base": Slot((Gradients, Codec), help="the model that stays as it is"),
        "earlier": Slot((Prompts,), min=0, help="what this method made of that base; its tasks are kept"),
    },
    data={"train": DataSlot(Data.FEW_SHOT, prompts.READ, help="records grouped by task")},
    forms=("program",),
    run=run,
    cost=cost,
    agree=agree,
    open=open,
)
