"""What merges ask of their inputs and settings before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lfm.core.errors import ConfigError
from lfm.core.method import Inputs, Sizes
from lfm.core.model import Model, Weights
from lfm.tensors import match
from lfm.tensors.lazy import CHUNK
from lfm.tensors.match import floating, same
from lfm.tensors.parallel import threads

if TYPE_CHECKING:
    from lfm.core.model import LazyTensor

Tensors = Mapping[str, "LazyTensor"]


def opened(models: Sequence[Model]) -> tuple[list[str], list[Tensors]]:
    """The names that arithmetic applies to, and every model's tensors. MismatchError if integer tensors differ."""
    tensors = [model.ask(Weights).tensors() for model in models]
    names = floating(tensors[0])
    same(tensors[0].keys() - set(names), models)
    return names, tensors


def together(inputs: Inputs) -> None:
    """MismatchError unless base and models go together."""
    match.agree([*inputs.all("base"), *inputs.all("models")])


def one_each(name: str, given: Sequence[float], count: int, default: float = 1.0) -> tuple[float, ...]:
    """A setting with one value a model; one value alone is everyone's. ConfigError for another number of them."""
    values = tuple(given) or (default,)
    if len(values) == 1:
        values *= count
    if len(values) != count:
        raise ConfigError(f"{name} has {len(values)} values for {count} models", fix="give one a model, in their order")
    return values


def memory(sizes: Sizes) -> int:
    """Bytes that a merge holds: buffers of a chunk, whatever the model's size."""
    inputs = sum(len(models) for models in sizes.models.values())
    return 120_000_000 + threads() * (inputs + 1) * 8 * CHUNK
