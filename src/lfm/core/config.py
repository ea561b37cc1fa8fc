"""Config: the settings of a method, from which CLI help, recipes' JSON Schema and docs are made.

class Config(lfm.core.Config):
    rank: Annotated[int, Meta(ge=1, description="rank of the update")] = 8
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from lfm.core.errors import ConfigError

__all__ = ["Config", "Field", "Meta", "configure", "fields", "schema", "values"]

C = TypeVar("C", bound="Config")


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Frozen, keyword-only settings; every field has a default, a type and (by Meta) a range and a description."""


class Field(msgspec.Struct, frozen=True):
    """One setting, as help and docs show it."""

    name: str
    type: str
    default: Any
    help: str


SCALARS = ("number", "integer", "string", "boolean")


def values(config: Config) -> dict[str, Any]:
    """The settings as plain JSON values."""
    return msgspec.to_builtins(config)


def schema(kind: type[Config]) -> dict[str, Any]:
    """JSON Schema of a Config type, inlined (no $ref)."""
    whole = msgspec.json.schema(kind)
    name = whole["$ref"].rsplit("/", 1)[-1]
    made = whole["$defs"].pop(name)
    made["properties"] = {key: _or_one(told) for key, told in made.get("properties", {}).items()}
    return made | ({"$defs": whole["$defs"]} if whole["$defs"] else {})


def _or_one(told: dict[str, Any]) -> dict[str, Any]:
    """A list's schema, for which one value may stand too."""
    items = told.get("items")
    if told.get("type") != "array" or not isinstance(items, dict) or items.get("type") not in SCALARS:
        return told
    about = {key: told[key] for key in ("description", "default") if key in told}
    return {"anyOf": [{key: value for key, value in told.items() if key not in about}, items], **about}


def fields(kind: type[Config]) -> list[Field]:
    """The settings of a Config type in the order of their definition."""
    found = []
    for field in msgspec.structs.fields(kind):
        default = field.default if field.default is not msgspec.NODEFAULT else None
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        found.append(Field(field.encode_name, spoken(field.type), default, _description(field.type)))
    return found


def spoken(type_: Any) -> str:
    """A setting's type in words: `float > 0`, `model or tensor`, `list of int ≥ 1`, `int or none`."""
    origin, arguments = get_origin(type_), get_args(type_)
    if origin is Annotated:
        base, *notes = arguments
        return " ".join([spoken(base), *(limit for note in notes if isinstance(note, Meta) for limit in _limits(note))])
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " or ".join(spoken(a) for a in arguments)
    if origin in (tuple, list, set, frozenset):
        return "list of " + spoken(arguments[0])
    if origin is not None and issubclass(origin, Mapping):
        return f"map of {spoken(arguments[0])} to {spoken(arguments[1])}"
    return "none" if type_ is type(None) else getattr(type_, "__name__", str(type_))


def _limits(note: Meta) -> Iterator[str]:
    for sign, limit in (("≥", note.ge), (">", note.gt), ("≤", note.le), ("<", note.lt)):
        if limit is not None:
            yield f"{sign} {limit:g}"


def _description(type_: Any) -> str:
    notes = get_args(type_)[1:] if get_origin(type_) is Annotated else ()
    return next((n.description for n in notes if isinstance(n, Meta) and n.description), "")


def configure(kind: type[C], settings: Mapping[str, Any], *, where: str = "") -> C:
    """A Config from plain values (strings from a command line are converted to the field's type).

    Raises ConfigError naming the setting, its range, and the nearest known name.
    """
    known = {field.name: field for field in fields(kind)}
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{where + ': ' if where else ''}unknown setting {name!r}",
                fix=f"did you mean {near[0]!r}?" if near else f"known settings: {', '.join(known) or 'none'}",
            )
    for name, value in settings.items():
        if _infinite(value):
            raise ConfigError(f"{where + ': ' if where else ''}setting {name!r}: {value} is no number to compute with")
    lists = {field.name for field in msgspec.structs.fields(kind) if get_origin(_bare(field.type)) is tuple}
    given = {name: (value,) if name in lists and _single(value) else value for name, value in settings.items()}
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        text = str(error)
        name = text.rsplit("$.", 1)[-1].split("`")[0].split("[")[0] if "$." in text else ""
        what = f"setting {name!r}: {text.split(' - at')[0]}" if name else text
        hint = known.get(name)
        raise ConfigError(
            f"{where + ': ' if where else ''}{what}",
            why=f"{name}: {hint.help}" if hint and hint.help else "",
            fix=f"it takes {hint.type}; the default is {hint.default!r}" if hint else "",
        ) from None


def _bare(type_: Any) -> Any:
    """A type without the notes that come with it."""
    return get_args(type_)[0] if get_origin(type_) is Annotated else type_


def _single(value: Any) -> bool:
    """One value where a list may stand: the list of it."""
    return isinstance(value, bool | int | float | str)


def _infinite(value: Any) -> bool:
    """Whether a setting as written is a NaN or an infinity."""
    if isinstance(value, list | tuple):
        return any(map(_infinite, value))
    try:
        return isinstance(value, int | float | str) and not math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False
