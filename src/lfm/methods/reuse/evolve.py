"""Search a merge's settings for what does best on held-out records: no gradient, only tries.

    s* = argmax_s  metric(merge(models; s), dev),   s ∈ [low, high]^d        by CMA-ES from the merge's defaults

`method` is any merge by weights alone (reuse.task_arithmetic, reuse.dare_ties, …), `space` names its settings that are
searched and their limits; one that is a list has a number for each model. With `groups` the blocks are parted by depth
into as many groups with settings of their own, and what lies outside blocks is one more. `settings` are fixed. `order`
searches the merged blocks' places too: at each depth stands the block from there, or from up to so many before or after
it. The depth stays.

Paper: Evolutionary optimization of model merging recipes, arXiv 2403.13187: merging in parameter space, and of its data
flow space the part that keeps the depth. Differs: it begins at the defaults, not at random, so that a small budget is
no loss; the limits are mirrors; random merges draw the same numbers in every try. With accuracy the loss decides
between equals. A block that stands elsewhere is not scaled (the paper's W).

The best of many tries on few records is flattered by them: what is told of it is measured on `valid`, which takes no
part; without it, on a part of `dev` that is set aside (`held_out`). The defaults, the base and the model that alone is
best on dev are measured there as well. The result is the best on dev, the defaults among the candidates: read in the
notes whether it holds on valid. Each try is kept, so that an interrupted search goes on.

With `reuse.merge` any recipe of mergekit's is searched: it holds ${NAME}s in place of numbers, and `space` names them
as values.NAME (`lfm merge RECIPE OUT --vary NAME=LOW,HIGH --dev FILE` does so); such numbers begin midway.

Models: those that the method takes; one try at a time is in memory. The result is what the method makes. Data: any
records with a task. Errors: ConfigError for settings that the method does not take, or a method that asks for more than
weights, before any weight is read; MismatchError; DataError for records that set no task.

On the zoo's eight experts, led by 1024 images for at most 200 tries and measured on the 2880 test images: task
arithmetic as it is 67.4 %, its λ alone searched 75.6, a weight for each model 77.1 (on dev 80.4), for each in three
groups of blocks 76.5; TIES' λ and the blocks' order gain nothing.

    lfm run reuse.evolve base=base models=math models=code dev=dev.jsonl --set budget=40 --out merged
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from math import log
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

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
from lfm.fusing.inputs import memory, opened, rebuilt
from lfm.tensors import depth, match
from lfm.train.examine import Criterion, Score, examiner

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORST = 1e30
"""Loss of a candidate that cannot be: its weights leave the range of their dtype, or its settings contradict."""

TIE = 1e-6
"""What the loss counts where accuracy decides; less than one answer in a million."""


class Recipe(NamedTuple):
    """A candidate: the method's settings by group, and from how far each block comes; empty: all stay."""

    settings: list[dict[str, Any]]
    moves: list[int]


class Config(lfm.core.Config, frozen=True):
    method: Annotated[str, Meta(description="id of a merge that asks for weights alone")] = "reuse.task_arithmetic"
    space: Annotated[
        dict[str, tuple[float, float]], Meta(description="settings that are searched: name → [low, high]")
    ] = msgspec.field(default_factory=lambda: {"weights": (0.0, 2.0)})
    settings: Annotated[
        dict[str, Any], Meta(description="the method's settings that are fixed, beside its defaults")
    ] = msgspec.field(default_factory=dict)
    groups: Annotated[int, Meta(ge=1, description="parts of the depth with settings of their own; 1: all alike")] = 1
    order: Annotated[int, Meta(ge=0, description="places a block may come from before or after its own; 0: none")] = 0
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
    box, order = boxes(config, inputs)
    tried: dict[str, Score] = {}

    def at(point: NDArray[Any]) -> Recipe:
        return Recipe(box.at(point[: box.dim]), order.at(point[box.dim :])[0]["moves"] if order else [])

    def make(recipe: Recipe, name: str) -> Model:
        return merged(config, inputs, recipe, search.Trial(run, name))

    def measured(where: str, what: str, model: Callable[[], Model]) -> Score:
        return Score(*run.step(f"{what} on {where}", lambda: list(exams[where](model().ask(Logits).logits))))

    def score(recipe: Recipe, name: str) -> list[float]:
        try:
            return list(exams["dev"](make(recipe, name).ask(Logits).logits))
        except (CorruptError, ConfigError):  # the defaults were read: it is this candidate that cannot be
            return [0.0, WORST]

    def candidate(recipe: Recipe) -> Score:
        key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
        if key not in tried:
            tried[key] = Score(*run.step(f"candidate {key}", lambda: score(recipe, key)))
        return tried[key]

    start = Recipe([box.unsearched()] * box.copies, [])
    dim = box.dim + (order.dim if order else 0)
    before = measured("dev", "defaults", lambda: make(start, "defaults"))
    best, reached, popsize, candidates = start, before, population(config, dim), 0
    run.curve(f"best {config.by} on dev", getattr(reached, config.by))
    for generation in search.generations(
        lambda points: [_cost(candidate(at(point)), config.by) for point in points],
        dim,
        sigma=config.sigma,
        popsize=popsize,
        budget=max(config.budget, popsize),
        run=run,
        seed=run.seed_for("search"),
    ):
        candidates += len(generation.values)
        recipe = at(generation.points[generation.best])
        found = candidate(recipe)
        if found.beats(reached, config.by):
            best, reached = recipe, found
        run.curve(f"best {config.by} on dev", getattr(reached, config.by))

    evolved = make(best, "evolved")
    told = {
        "evolved": measured("valid", "evolved", lambda: evolved),
        "defaults": measured("valid", "defaults", lambda: make(start, "defaults")),
    }
    if base:
        told["base"] = measured("valid", "base", lambda: base[0])
    alone = [measured("dev", f"model {i}", lambda m=m: _once(m)) for i, m in enumerate(models)]
    first = min(range(len(models)), key=lambda i: _cost(alone[i], config.by))
    told["best_model"] = measured("valid", "best model", lambda: _once(models[first]))
    _tell(run, "valid", told)
    _tell(run, "dev", {"evolved": reached, "defaults": before})
    run.note(settings=json.dumps(best.settings if box.copies > 1 else best.settings[0]), candidates=candidates)
    if order:
        run.note(moves=json.dumps(best.moves))
    return evolved


def _tell(run: Run, where: str, scores: Mapping[str, Score]) -> None:
    for what, value in scores.items():
        run.note(**{f"{where}_accuracy_{what}": value.accuracy, f"{where}_loss_{what}": value.loss})


def merged(config: Config, inputs: Inputs, recipe: Recipe, run: Run) -> Model:
    """What the method makes with these settings: of all tensors, or of each with its group's; and then the order."""
    method = _method(config)
    given = check(config.method, method, Inputs(inputs.models))
    configs = [configure(method.config, settings) for settings in recipe.settings]
    if len(configs) == 1:
        model = method.run(configs[0], given, run)
        assert isinstance(model, Model)
        if not any(recipe.moves):
            return model
        made = dict(model.ask(Weights).tensors())
    else:
        assert method.merge is not None
        names, tensors = opened((*given.all("base"), *given.all("models")))
        base, models = (tensors[0], tensors[1:]) if given.all("base") else (None, tensors)
        part, _ = depth.groups(tensors[0], config.groups)
        made = {**tensors[0], **method.merge(names, base, models, lambda name: configs[part(name)], run)}
    if any(recipe.moves):
        made = depth.moved(made, recipe.moves)
    return rebuilt(inputs, {name: made[name] for name in match.floating(made)})


def boxes(config: Config, inputs: Inputs) -> tuple[search.Box, search.Box | None]:
    """What is searched: the method's settings for each group, and the blocks' order."""
    tensors = inputs.all("models")[0].ask(Weights).tensors()
    copies = depth.groups(tensors, config.groups)[1] if config.groups > 1 else 1
    settings = search.box(
        _method(config).config, config.space, config.settings, len(inputs.all("models")), copies=copies
    )
    if not config.order:
        return settings, None
    places = len(depth.blocks(tensors))
    axis = search.Axis("moves", -config.order, config.order, whole=True, length=places, start=(0.0,) * places)
    return settings, search.Box((axis,), {})


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


def _once(model: Model) -> Model:
    """The model under a handle of its own, whose module goes with it: no two models are in memory at a time."""
    return model.ask(Weights).replace({})


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


def agree(config: Config, inputs: Inputs) -> None:
    method = _method(config)
    given = check(config.method, method, Inputs(inputs.models))
    match.agree((*inputs.all("base"), *inputs.all("models")))
    if config.groups > 1:
        if method.merge is None:
            raise ConfigError(f"{config.method} takes no settings by tensor", fix="leave groups at 1")
        found = depth.depths(inputs.all("models")[0].ask(Weights).tensors()).values()
        blocks = max((place.blocks for place in found), default=0)
        if config.groups > blocks:
            raise ConfigError(f"{config.groups} groups of {blocks} blocks", fix="a group has one block or more")
    box, _ = boxes(config, inputs)
    for settings in box.corners():
        configured = configure(method.config, settings, where=config.method)
        if method.agree:
            method.agree(configured, given)
    if not inputs.records("valid") and len(inputs.records("dev")) < 2:
        raise DataError("dev has one record", why="it is parted into what chooses and what measures", fix="add valid=")


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
        "models": Slot((Weights, Codec), max=None, help="models to merge"),
    },
    data={
        "dev": DataSlot(Data.FEW_SHOT, RECORDS, help="held-out records that the search is led by"),
        "valid": DataSlot(Data.FEW_SHOT, RECORDS, optional=True, help="others, on which its result is measured"),
    },
    run=run,
    cost=cost,
    agree=agree,
)
