"""What merges have in common before any weight is read: the roles of their models, their weights, their cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from lfm.core import Config, Cost, Inputs, Meta, Model, Run, Sizes, Slot, Weights
from lfm.core.errors import ConfigError
from lfm.tensors import match
from lfm.tensors.lazy import CHUNK
from lfm.tensors.match import floating, same
from lfm.tensors.parallel import threads

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor

Tensors = Mapping[str, "LazyTensor"]
Given = Callable[[str], Mapping[str, Any]]
"""A tensor's name → what a rule is given for it."""

C = TypeVar("C", bound=Config)
K = TypeVar("K")
T = TypeVar("T")

Merge = Callable[[Sequence[str], "Tensors | None", Sequence[Tensors], Callable[[str], C], Run], "dict[str, LazyTensor]"]
"""merge(names, base, models, configs, run): these tensors merged lazily, each by the settings configs(name)."""

Weighting = Annotated[
    tuple[float, ...], Meta(description="one a model, in their order, or one for all; empty: each counts as 1")
]
Densities = Annotated[
    tuple[Annotated[float, Meta(gt=0, le=1)], ...],
    Meta(description="fraction of each model's changes that is kept: one a model, or one for all"),
]
Scale = Annotated[float, Meta(description="λ, how far to go from the base along the merged change")]
Normalize = Annotated[bool, Meta(description="divide by the sum of the weights that count")]
Regrow = Annotated[bool, Meta(description="grow what is kept to the l₁ norm of all of the tensor's changes")]
Cancelled = Annotated[
    Literal["base", "positive"],
    Meta(
        description="what an entry becomes whose weighted changes cancel exactly: the base's, or by the positive ones"
    ),
]

BASE = Slot((Weights,), help="what the models were fine-tuned from")
TUNED = Slot((Weights,), max=None, help="fine-tuned models to merge")
BASE_AND_TUNED = {"base": BASE, "models": TUNED}


def opened(models: Sequence[Model]) -> tuple[list[str], list[Tensors]]:
    """The names that arithmetic applies to, and every model's tensors. MismatchError if integer tensors differ."""
    tensors = [model.ask(Weights).tensors() for model in models]
    names = floating(tensors[0])
    same(tensors[0].keys() - set(names), models)
    return names, tensors


def with_base(inputs: Inputs) -> tuple[list[str], Tensors, list[Tensors]]:
    """Names, the base's tensors, and those of the models."""
    names, (base, *models) = opened((inputs.model("base"), *inputs.all("models")))
    return names, base, models


def whole(merge: Merge[C]) -> Callable[[C, Inputs, Run], Model]:
    """The run of a method that merges tensor by tensor: every floating tensor, with the same settings for all."""

    def run(config: C, inputs: Inputs, run: Run) -> Model:
        given = inputs.all("base")
        names, tensors = opened((*given, *inputs.all("models")))
        base = tensors[0] if given else None
        return rebuilt(inputs, merge(names, base, tensors[len(given) :], lambda name: config, run))

    return run


def known(run: Run, step: str, names: Sequence[str], fn: Callable[[], dict[str, T]]) -> dict[str, T]:
    """What is found of these tensors before they are merged, kept as a step of the run."""
    return run.step(f"{step} {names[0]}", fn) if names else {}


def by_setting(
    names: Sequence[str], setting: Callable[[str], K], fn: Callable[[K, list[str]], dict[str, T]]
) -> dict[str, T]:
    """fn(setting, names) of the tensors that share it, for each of its values."""
    groups: dict[K, list[str]] = {}
    for name in names:
        groups.setdefault(setting(name), []).append(name)
    return {name: made for value, group in groups.items() for name, made in fn(value, group).items()}


def rebuilt(inputs: Inputs, made: Tensors) -> Model:
    """The base, or without one the first model, with these tensors."""
    return (*inputs.all("base"), *inputs.all("models"))[0].ask(Weights).replace(made)


def together(inputs: Inputs) -> None:
    """MismatchError unless base and models go together."""
    match.agree([*inputs.all("base"), *inputs.all("models")])


def agree(config: Any, inputs: Inputs) -> None:
    """ConfigError for weights or densities of another number; MismatchError unless all go together."""
    count = len(inputs.all("models"))
    for name in ("weights", "density", "gamma", "epsilon"):
        if isinstance(getattr(config, name, None), tuple):
            one_each(name, getattr(config, name), count)
    together(inputs)


def one_each(name: str, given: Sequence[float], count: int) -> tuple[float, ...]:
    """A setting with one value a model; one alone is everyone's, none is 1. ConfigError for another number of them."""
    values = tuple(given) or (1.0,)
    if len(values) == 1:
        values *= count
    if len(values) != count:
        raise ConfigError(f"{name} has {len(values)} values for {count} models", fix="give one a model, in their order")
    return values


def normalized(weights: Sequence[float], name: str) -> list[float]:
    """Weights by their sum. ConfigError naming the tensor where that is 0."""
    total = sum(weights)
    if not total:
        raise ConfigError(f"the weights of {name!r} sum to zero", fix="set normalize=false to add and subtract models")
    return [weight / total for weight in weights]


def summed(config: Any, count: int) -> dict[str, Any]:
    """What a sum of changes is given (lfm.fusing.joins.added), by a config's weights, scale and normalize."""
    weights = one_each("weights", config.weights, count)
    total = sum(weights)
    return {
        "weight": weights,
        "scale": config.scale / total if config.normalize and abs(total) >= 1e-8 else config.scale,
    }


def elected(config: Any, count: int) -> dict[str, Any]:
    """What a sum of changes of one sign is given (lfm.fusing.joins.agreed), by a config that says `cancelled` too."""
    return {
        "weight": one_each("weights", config.weights, count),
        "scale": config.scale,
        "divide": config.normalize,
        "cancelled": 1.0 if config.cancelled == "positive" else 0.0,
    }


def thinned(config: Any, count: int) -> dict[str, Any]:
    """What dropping at random is given (lfm.fusing.joins.dropped), by a config's density and rescale."""
    density = one_each("density", config.density, count)
    return {"density": density, "grow": [1 / d if config.rescale and d else 1.0 for d in density]}


def memory(sizes: Sizes) -> int:
    """Bytes that a merge holds: buffers of a chunk, whatever the model's size."""
    inputs = sum(len(models) for models in sizes.models.values())
    return 120_000_000 + threads() * (inputs + 1) * 8 * CHUNK


def streamed(operations: float) -> Callable[[Any, Sizes], Cost]:
    """The cost of so many operations an element of each model."""

    def cost(config: Any, sizes: Sizes) -> Cost:
        models = [facts for role in sizes.models.values() for facts in role]
        flops = operations * sum(facts.parameters for facts in models)
        return Cost(flops=flops, memory=memory(sizes), disk=models[0].bytes, light=True)

    return cost
