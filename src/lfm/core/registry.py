"""Discovery: a method's id is its path. edit.rome is lfm/methods/edit/rome.py; third parties use an entry point."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from lfm.core.errors import UnknownMethod
from lfm.core.interfaces import Answers
from lfm.core.method import Data, Method

ENTRY_POINTS = "lfm.methods"
"""Entry-point group: name = the id (area.name), value = a module that holds METHOD."""

AREAS = ("tune", "prompt", "augment", "distill", "reuse", "meta", "edit", "probe")


class Listed(NamedTuple):
    """A method with its id and the docstring of its file."""

    id: str
    method: Method[Any]
    doc: str

    @property
    def area(self) -> str:
        return self.id.split(".")[0]

    @property
    def summary(self) -> str:
        return self.doc.split("\n", 1)[0].rstrip(".")


@cache
def ids() -> dict[str, str]:
    """Every method's id and its module: ours in the order of the areas, then third parties'. Imports none."""
    root = Path(__file__).parent.parent / "methods"
    found = {
        f"{area}.{file.stem}": f"lfm.methods.{area}.{file.stem}"
        for area in AREAS
        for file in sorted((root / area).glob("*.py"))
        if not file.stem.startswith("_")
    }
    for point in entry_points(group=ENTRY_POINTS):
        found.setdefault(point.name, point.value)
    return found


def get(id: str) -> Listed:
    """One method by id. UnknownMethod names the nearest ids."""
    if id not in ids():
        near = get_close_matches(id, ids(), n=3, cutoff=0.5) or [i for i in ids() if i.endswith("." + id)]
        raise UnknownMethod(
            f"no method {id!r}",
            fix=f"did you mean {' or '.join(near)}?" if near else "`lfm methods` lists all",
        )
    module: ModuleType = importlib.import_module(ids()[id])
    return Listed(id, module.METHOD, inspect.cleandoc(module.__doc__ or ""))


KEPT = frozenset({Answers})
"""What was kept of a model, and stands for it where a role takes it: other roles then want models of their own."""


def standing(method: Method[Any], have: Collection[type]) -> list[str]:
    """The roles that models of this access play where others want a model of another kind; none where they play all.

    What was kept plays those that name it.
    """
    if KEPT.issuperset(have):
        return [role for role, slot in method.models.items() if set(have) & set(slot.declared)]
    wanted = {role: slot for role, slot in method.models.items() if slot.min > 0}
    roles = [role for role, slot in wanted.items() if not slot.missing(have)]
    return roles if len(roles) < len(wanted) else []


def lacking(method: Method[Any], have: Collection[type]) -> set[type]:
    """What models that give this lack for the roles that must be filled."""
    return {kind for slot in method.models.values() if slot.min > 0 for kind in slot.missing(have)}


def methods(area: str | None = None, *, have: Iterable[type] | None = None, data: Data | None = None) -> list[Listed]:
    """The methods of an area (of all areas), and of those only what works with this access and this much data.

    have: the interfaces that the models in hand give; a slot that may stay empty asks nothing. Methods of several roles
    are among them where these models play some of them (`standing`).
    """
    listed = [get(id) for id in ids() if area is None or id.split(".")[0] == area]
    if have is not None:
        given = frozenset(have)
        listed = [m for m in listed if standing(m.method, given) or not lacking(m.method, given)]
    if data is not None:
        listed = [m for m in listed if m.method.level <= data]
    return listed
