"""Methods that can stand for each other: one model and its records in, one model out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from lfm.core import registry
from lfm.core.config import configure
from lfm.core.errors import ConfigError
from lfm.core.method import Method

SIZES = ("calls", "queries", "budget", "rounds", "generations", "candidates", "trials", "samples", "steps")
"""Settings by which a method asks less; `examples` is the last to be made smaller."""

LAST = "examples"

PARTS = 32
"""Of the way between sizes that fit and their doubles, in so many parts what fits is found."""


def alone(method: Method[Any], kind: str) -> bool:
    """Whether a method makes a model of `model` and `train`, of records of a kind ("": of any), and needs no more."""
    models = {role for role, slot in method.models.items() if slot.min}
    data = {role for role, slot in method.data.items() if not slot.optional}
    train = method.data.get("train")
    return (
        method.gives == "model"
        and models == {"model"}
        and train is not None
        and data <= {"train"}
        and kind in ("", *(train.kinds or (kind,)))
    )


def fixed(method: Method[Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Of the fixed settings those that the method has. What speaks for a label is to some one word, to others several:
    either form is given to both."""
    own = {name: value for name, value in settings.items() if name in method.config.__struct_fields__}
    if isinstance(words := own.get("words"), Mapping):
        several = {label: [said] if isinstance(said, str) else said for label, said in words.items()}
        one = {label: said[0] if isinstance(said, list | tuple) and said else said for label, said in words.items()}
        own["words"] = next((form for form in (words, several, one) if _takes(method, form)), words)
    return own


def _takes(method: Method[Any], words: Mapping[str, Any]) -> bool:
    try:
        configure(method.config, {"words": words})
    except ConfigError:
        return False
    return True


def tried(
    area: str, fits: Callable[[str, Method[Any]], bool], named: Sequence[str], settings: dict[str, Any], *, why: str
) -> list[str]:
    """The ids to try: those named, or all of the area that fit.

    ConfigError for one that is named and cannot be tried (why: what it would need), or for a setting that none has.
    """
    fitting = [listed.id for listed in registry.methods(area) if fits(listed.id, listed.method)]
    for id in named:
        method = registry.get(id).method
        if not fits(id, method):
            raise ConfigError(
                f"{id} cannot be tried", why=why, fix=f"these can: {', '.join(fitting)}" if fitting else ""
            )
        configure(method.config, fixed(method, settings), where=id)
    ids = list(dict.fromkeys(named)) or fitting
    known = {field for id in ids for field in registry.get(id).method.config.__struct_fields__}
    if unknown := sorted(settings.keys() - known):
        raise ConfigError(f"settings: no method that is tried has {', '.join(unknown)}")
    return ids


def largest(
    config: Any, cost: Callable[[Any], float], fits: Callable[[Any], bool]
) -> tuple[dict[str, int], Any] | None:
    """(what differs, the settings) with sizes made smaller together until they fit; None where the least does not."""
    above = config
    for changed, made in _smaller(config, cost):
        if fits(made):
            best = _between(made, above, fits)
            return {name: getattr(best, name) for name in changed}, best
        above = made
    return None


def _smaller(config: Any, cost: Callable[[Any], float]) -> Iterator[tuple[dict[str, int], Any]]:
    """(what differs, the settings) with sizes halved again and again: those that lower the cost, `examples` last."""
    held = [f.name for f in msgspec.structs.fields(type(config)) if isinstance(f.default, int)]
    sizes = [name for name in (*SIZES, LAST) if name in held and _halved(config, [name]) is not None]
    sizes = [name for name in sizes if cost(_least(config, name)) < cost(config)]
    changed: dict[str, int] = {}
    yield {}, config
    for names in ([name for name in sizes if name != LAST], [name for name in sizes if name == LAST]):
        while names and (made := _halved(config, names)) is not None:
            config, changed = made, changed | {name: getattr(made, name) for name in names}
            yield dict(changed), config


def _between(made: Any, above: Any, fits: Callable[[Any], bool]) -> Any:
    """The largest settings that fit, on the way from some that do to some that may not, by bisection."""
    ends = {name: (getattr(made, name), getattr(above, name)) for name in (*SIZES, LAST) if hasattr(made, name)}
    fitting, beyond = 0, PARTS
    while beyond - fitting > 1:
        part = (fitting + beyond) // 2
        values = {name: low + (high - low) * part // PARTS for name, (low, high) in ends.items() if low != high}
        tried = msgspec.structs.replace(made, **values)
        if fits(tried):
            fitting, made = part, tried
        else:
            beyond = part
    return made


def _least(config: Any, name: str) -> Any:
    """The settings with this one as small as may be: the first halving may change nothing, where data are few."""
    while (made := _halved(config, [name])) is not None:
        config = made
    return config


def _halved(config: Any, names: Sequence[str]) -> Any:
    """The settings with each of these halved where that is allowed; None where nothing changes."""
    made = config
    for name in names:
        tried = msgspec.structs.replace(made, **{name: max(1, getattr(made, name) // 2)})
        with suppress(msgspec.ValidationError):
            made = msgspec.convert(msgspec.to_builtins(tried), type(config))
    return None if made == config else made
