"""Search a merge's settings for what does best on held-out records: no gradient, only tries.

    s* = argmax_s  metric(merge(models; s), dev),   s ∈ [low, high]^d        by CMA-ES from the merge's defaults

`method` is any merge by weights alone (reuse.task_arithmetic, reuse.dare_ties, …), `space` names its settings that are
searched and their limits; one that is a list has a number for each model. With `groups` the blocks are parted by depth
into as many groups with settings of their own, and what lies outside blocks is one more. `settings` are fixed.

Paper: Evolutionary optimization of model merging recipes, arXiv 2403.13187, its merging in parameter space (mergekit's
`mergekit-evolve`). Differs: it begins at the defaults, not at random, so that a small budget is no loss; walls mirror;
random merges draw the same numbers in every try. With accuracy the loss decides between equals. The layers' order (data
flow space) is not searched.

The best of many tries on few records is flattered by them: what is told of it is measured on `valid`, which takes no
part; without it, on a part of `dev` that is set aside (`held_out`). The defaults, the base and the model that alone is
best on dev are measured there as well. The result is the best on dev, the defaults among the candidates: read in the
notes whether it holds on valid. Each try is kept, so that an interrupted search goes on.

Models: those that the method takes; one try at a time is in memory. The result is what the method makes. Data: any
records with a task. Errors: ConfigError for settings that the method does not take, or a method that asks for more than
weights, before any weight is read; MismatchError; DataError for records that set no task.

    lfm run reuse.evolve base=base models=math models=code dev=dev.jsonl --set budget=40 --out merged
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from math import log
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

import lfm.core
from lfm import search
from lfm.core import (
    Codec,
    Cost,
    Data,
    DataSlot,
    Inputs,
    Logits,
    Meta,
    Method,
    Model,
    Run,
    Sizes,
    Slot,
    Weights,
    registry,
)
from lfm.core.config import configure
from lfm.core.errors import ConfigError, CorruptError, DataError
from lfm.core.method import check
from lfm.fusing.inputs import memory
from lfm.tensors import match
from lfm.tensors.depth import depths
from lfm.tensors.match import floating
from lfm.train.examine import Criterion, Score, examiner

if TYPE_CHECKING:
    from lfm.core.model import LazyTensor

WORST = 1e30
"""Loss of a candidate whose weights leave the range of their dtype."""

TIE = 1e-6
"""What the loss counts where accuracy decides; less than one answer in a million."""

Settings = list[dict[str, Any]]
"""A candidate: the method's settings by group."""

Part = Callable[[str], int]
"""A tensor's name → its group."""


class Config(lfm.core.Config, frozen=True):
    method: Annotated[str, Meta(description="id of a merge that asks for weights alone")] = "reuse.task_arithmetic"
    space: Annotated[
        dict[str, tuple[float, float]], Meta(description="settings that are searched: name → [low, high]")
    ] = msgspec.field(default_factory=lambda: {"weights": (0.0, 2.0)})
    settings: Annotated[
        dict[str, Any], Meta(description="the method's settings that are fixed, beside its defaults")
    ] = msgspec.field(default_factory=dict)
    groups: Annotated[int, Meta(ge=1, description="parts of the depth with settings of their own; 1: all alike")] = 1
    budget: Annotated[int, Meta(ge=2, description="candidates that are tried")] = 200
    population: Annotated[
        Annotated[int, Meta(ge=2)] | None, Meta(description="candidates a generation; null: 4 + 3 ln(numbers searched)")
    ] = None
    sigma: Annotated[float, Meta(gt=0, description="first step size, in lengths of the box's sides")] = 0.2
    by: Annotated[Criterion, Meta(description="what is best: accuracy (then loss), or loss")] = "accuracy"
    held_out: Annotated[
        float, Meta(gt=0, lt=1, description="share of dev set aside to measure the result, where there is no valid")
    ] = 0.5


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    base, models = inputs.all("base"), inputs.all("models")
    records = parted(inputs, config.held_out, run.seed_for("held out"))
    exams = {where: examiner(part, models[0]) for where, part in records.items()}
    part, copies = groups(inputs, config.groups)
    box = search.box(_method(config).config, config.space, config.settings, len(models), copies=copies)
    tried: dict[str, Score] = {}

    def make(settings: Settings, name: str) -> Model:
        return merged(config, inputs, settings, part, search.Trial(run, name))

    def measured(where: str, what: str, model: Callable[[], Model]) -> Score:
        return Score(*run.step(f"{what} on {where}", lambda: list(exams[where](model().ask(Logits).logits))))

    def score(settings: Settings, name: str) -> list[float]:
        try:
            return list(exams["dev"](make(settings, name).ask(Logits).logits))
        except CorruptError:  # the defaults read every input: it is this candidate that leaves the dtype's range
            return [0.0, WORST]

    def candidate(settings: Settings) -> Score:
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        if key not in tried:
            tried[key] = Score(*run.step(f"candidate {key}", lambda: score(settings, key)))
        return tried[key]

    start: Settings = [dict(config.settings)] * copies
    before = measured("dev", "defaults", lambda: make(start, "defaults"))
    best, reached, popsize = start, before, population(config, box.dim)
    run.curve(f"best {config.by} on dev", getattr(reached, config.by))
    for generation in search.generations(
        lambda points: [_cost(candidate(box.at(point)), config.by) for point in points],
        box.dim,
        sigma=config.sigma,
        popsize=popsize,
        budget=max(config.budget, popsize),
        run=run,
        seed=run.seed_for("search"),
    ):
        settings = box.at(generation.points[generation.best])
        found = candidate(settings)
        if found.beats(reached, config.by):
            best, reached = settings, found
        run.curve(f"best {config.by} on dev", getattr(reached, config.by))

    evolved = make(best, "evolved")
    told = {
        "evolved": measured("valid", "evolved", lambda: evolved),
        "defaults": measured("valid", "defaults", lambda: make(start, "defaults")),
    }
    if base:
        told["base"] = measured("valid", "base", lambda: base[0])
    alone = [measured("dev", f"model {i}", lambda m=m: m) for i, m in enumerate(models)]
    first = min(range(len(models)), key=lambda i: _cost(alone[i], config.by))
    told["best_model"] = measured("valid", "best model", lambda: models[first])
    for what, value in told.items():
        run.note(**{f"valid_accuracy_{what}": value.accuracy, f"valid_loss_{what}": value.loss})
    for what, value in (("evolved", reached), ("defaults", before)):
        run.note(**{f"dev_accuracy_{what}": value.accuracy, f"dev_loss_{what}": value.loss})
    run.note(settings=json.dumps(best if copies > 1 else best[0]), candidates=len(tried), valid=len(records["valid"]))
    return evolved


def merged(config: Config, inputs: Inputs, settings: Settings, part: Part, trial: Run) -> Model:
    """What the method makes with these settings: of each tensor that which its group's settings give."""
    method, given = _method(config), _given(config, inputs)
    results: list[Model] = []
    for place, each in enumerate(settings):
        same = next((results[i] for i in range(place) if settings[i] == each), None)
        made = same or method.run(configure(method.config, each), given, trial)
        assert isinstance(made, Model)
        results.append(made)
    if all(result is results[0] for result in results):
        return results[0]
    tensors = [result.ask(Weights).tensors() for result in results]
    chosen: dict[str, LazyTensor] = {name: tensors[part(name)][name] for name in floating(tensors[0])}
    return (*inputs.all("base"), *inputs.all("models"))[0].ask(Weights).replace(chosen)


def groups(inputs: Inputs, count: int) -> tuple[Part, int]:
    """Each tensor's group, and how many there are: of equally many blocks from the first on, then what is outside."""
    if count == 1:
        return lambda name: 0, 1
    tensors = inputs.all("models")[0].ask(Weights).tensors()
    found = {name: depth.block * count // depth.blocks for name, depth in depths(tensors).items()}
    outside = any(name not in found for name in tensors)
    return lambda name: found.get(name, count), count + outside


def parted(inputs: Inputs, share: float, seed: int) -> dict[str, list[Any]]:
    """dev, and valid: what is given, or else a share of dev drawn by the seed."""
    dev, valid = list(inputs.records("dev")), list(inputs.records("valid"))
    if not valid:
        random.Random(seed).shuffle(dev)
        aside = min(max(1, round(share * len(dev))), len(dev) - 1)
        dev, valid = dev[aside:], dev[:aside]
    return {"dev": dev, "valid": valid}


def population(config: Config, dim: int) -> int:
    """Candidates a generation: CMA-ES's own choice unless told."""
    return config.population or 4 + int(3 * log(dim))


def _cost(score: Score, by: Criterion) -> float:
    if by == "loss":
        return score.loss
    return -score.accuracy + TIE * (score.loss / (1 + score.loss))


def _method(config: Config) -> Method[Any]:
    """The merge that is searched. ConfigError for a method that is none by weights alone."""
    method = registry.get(config.method).method
    if not _fits(method):
        others = [listed.id for listed in registry.methods("reuse") if _fits(listed.method)]
        raise ConfigError(
            f"{config.method} is no merge by weights alone",
            why="its result must follow from its settings and the models' weights",
            fix=f"these are: {', '.join(others)}",
        )
    return method


def _fits(method: Method[Any]) -> bool:
    needs = {kind for role in ("base", "models") if role in method.models for kind in method.models[role].needs}
    asked = {role for role, slot in method.models.items() if slot.min > 0}
    takes = needs == {Weights} and "models" in method.models and asked <= {"base", "models"}
    return takes and not method.data and method.gives == "model" and method.open is None


def _given(config: Config, inputs: Inputs) -> Inputs:
    return check(config.method, _method(config), Inputs(inputs.models))


def agree(config: Config, inputs: Inputs) -> None:
    method, given = _method(config), _given(config, inputs)
    box = search.box(method.config, config.space, config.settings, len(inputs.all("models")))
    for settings in box.corners():
        configured = configure(method.config, settings, where=config.method)
        if method.agree:
            method.agree(configured, given)
    match.agree((*inputs.all("base"), *inputs.all("models")))
    if not inputs.records("valid") and len(inputs.records("dev")) < 2:
        raise DataError("dev has one record", why="it is parted into what chooses and what measures", fix="add valid=")
    if config.groups > 1:
        blocks = max((d.blocks for d in depths(inputs.all("models")[0].ask(Weights).tensors()).values()), default=0)
        if config.groups > blocks:
            raise ConfigError(f"{config.groups} groups of {blocks} blocks", fix="a group has one block or more")


def cost(config: Config, sizes: Sizes) -> Cost:
    models, dev = sizes.models["models"], sizes.data["dev"]
    # How many numbers are searched is not known here; a generation is 4 + 3 ln of that.
    tries = config.budget + 3 + len(models)
    return Cost(
        flops=tries * models[0].parameters * (4.0 * len(models) + 2.0 * dev.tokens),
        steps=tries * (1 + dev.records // 64),
        memory=memory(sizes) + 12 * models[0].parameters,
        disk=models[0].bytes,
    )


RECORDS = ("text", "completion", "label", "pair", "image", "fact")

METHOD = Method(
    paper="arXiv:2403.13187",
    config=Config,
    models={
        "base": Slot((Weights, Logits), min=0, help="what the models were fine-tuned from, if the merge asks for it"),
        "models": Slot((Weights, Logits, Codec), max=None, help="models to merge"),
    },
    data={
        "dev": DataSlot(Data.FEW_SHOT, RECORDS, help="held-out records that the search is led by"),
        "valid": DataSlot(Data.FEW_SHOT, RECORDS, optional=True, help="others, on which its result is measured"),
    },
    run=run,
    cost=cost,
    agree=agree,
)
