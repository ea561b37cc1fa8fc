"""A method's settings as a point in a box: what is searched, between which limits, and where the search begins."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Union, cast, final, get_args, get_origin

import msgspec

from lfm.core.config import Config, configure
from lfm.core.errors import ConfigError
from lfm.core.heavy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Limits = tuple[float, float]


@final
@dataclass(frozen=True)
class Axis:
    """One searched setting. length: its numbers, None where it is a single one. start: where the search begins."""

    name: str
    low: float
    high: float
    whole: bool
    length: int | None
    start: tuple[float, ...]


@final
@dataclass(frozen=True)
class Box:
    """The searched settings of a method, `copies` times over (one a group), and those that stay as they are."""

    axes: tuple[Axis, ...]
    fixed: Mapping[str, Any]
    copies: int = 1

    @property
    def dim(self) -> int:
        return self.copies * sum(len(axis.start) for axis in self.axes)

    def at(self, point: NDArray[Any]) -> list[dict[str, Any]]:
        """The settings of every copy at a point of R^dim: 0 is the start, 1 a side's length. Walls are mirrors."""
        found, place = [], 0
        for _ in range(self.copies):
            settings = dict(self.fixed)
            for axis in self.axes:
                numbers = [
                    _reflected(start, float(step), axis)
                    for start, step in zip(axis.start, point[place : place + len(axis.start)], strict=True)
                ]
                place += len(axis.start)
                _put(settings, axis, numbers)
            found.append(settings)
        return found

    def unsearched(self) -> dict[str, Any]:
        """The fixed settings, and where the search begins in maps, which have no defaults."""
        settings = dict(self.fixed)
        for axis in self.axes:
            if "." in axis.name:
                _put(settings, axis, list(axis.start))
        return settings

    def corners(self) -> list[dict[str, Any]]:
        """All lows, and all highs: where limits of the settings would show."""
        found = []
        for side in ([(a, a.low) for a in self.axes], [(a, a.high) for a in self.axes]):
            settings = dict(self.fixed)
            for axis, limit in side:
                _put(settings, axis, [_number(limit, axis)] * len(axis.start))
            found.append(settings)
        return found


def box(
    kind: type[Config], space: Mapping[str, Limits], fixed: Mapping[str, Any], count: int, *, copies: int = 1
) -> Box:
    """The box of a Config type: a setting that is a list has one number for each of `count` models.

    NAME.KEY is a number of a setting that maps names to numbers. Begins at the defaults, as far as the limits allow;
    a list left empty is all ones, as merges take it, a number that nothing tells is midway. ConfigError for a setting
    that is unknown or no number, or for limits that leave nothing between.
    """
    if not space:
        raise ConfigError("space is empty: nothing would be searched", fix='name settings: space={"weights": [0, 1]}')
    for name in space.keys() & fixed.keys():
        raise ConfigError(f"{name!r} is both searched and fixed", fix="leave it out of space or of settings")
    default = configure(kind, fixed)
    told = {field.name: field.type for field in msgspec.structs.fields(kind)}
    axes = []
    for name, (low, high) in space.items():
        outer, _, key = name.partition(".")
        if outer not in told:
            configure(kind, {name: low}, where="space")  # names the nearest
        shape = _shape(told[outer]) if not key else (False, False) if _maps_to_numbers(told[outer]) else None
        if shape is None:
            raise ConfigError(f"space: {name!r} is no number", fix="fix it: settings={…}, and search others")
        if not low < high:
            raise ConfigError(f"space: {name!r} has the limits {low:g} and {high:g}", fix="give [low, high]")
        whole, many = shape
        if whole and math.ceil(low) > math.floor(high):
            raise ConfigError(
                f"space: no whole number lies between {low:g} and {high:g}", why=f"{name!r} takes whole numbers"
            )
        length = count if many else None
        start = getattr(default, outer)
        start = start.get(key, (low + high) / 2) if key and isinstance(start, dict) else start
        axes.append(Axis(name, low, high, whole, length, _start(start, low, high, length)))
    return Box(tuple(axes), dict(fixed), copies)


def _put(settings: dict[str, Any], axis: Axis, numbers: list[float]) -> None:
    """Sets what the axis names: a setting, or one number within it."""
    outer, _, key = axis.name.partition(".")
    value = numbers if axis.length is not None else numbers[0]
    settings[outer] = {**settings.get(outer, {}), key: value} if key else value


def _maps_to_numbers(type_: Any) -> bool:
    bare = get_args(type_)[0] if get_origin(type_) is Annotated else type_
    return get_origin(bare) is dict and get_args(bare)[1] is float


def _shape(type_: Any) -> tuple[bool, bool] | None:
    """(whole numbers, a list of them) of a setting's type; None where it is no number."""
    origin, arguments = get_origin(type_), get_args(type_)
    if origin is Annotated:
        return _shape(arguments[0])
    if origin in (Union, types.UnionType):
        return next((shape for a in arguments if (shape := _shape(a))), None)
    if origin is tuple:
        inner = _shape(arguments[0])
        return (inner[0], True) if inner and not inner[1] else None
    return {float: (False, False), int: (True, False)}.get(type_)


def _start(value: Any, low: float, high: float, length: int | None) -> tuple[float, ...]:
    given: Sequence[Any] = value if isinstance(value, tuple) else (value,)
    numbers = [1.0] if not given else [(low + high) / 2 if v is None else float(v) for v in given]
    inside = tuple(min(max(v, low), high) for v in numbers)
    if length is not None and len(inside) == 1:
        return inside * length
    return inside if length in (None, len(inside)) else ((low + high) / 2,) * (length or 1)


def _reflected(start: float, step: float, axis: Axis) -> float:
    """start + step sides, thrown back by the walls as often as it meets them."""
    at = ((start - axis.low) / (axis.high - axis.low) + step) % 2
    return _number(axis.low + (axis.high - axis.low) * (2 - at if at > 1 else at), axis)


def _number(value: float, axis: Axis) -> float:
    if axis.whole:
        return cast("float", min(max(round(value), math.ceil(axis.low)), math.floor(axis.high)))
    return float(np.clip(value, axis.low, axis.high))
