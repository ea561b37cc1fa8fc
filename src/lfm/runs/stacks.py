"""What a ledger's patches are, and how they add up: changes of weights of low rank, or what one method's memory keeps.

A ledger holds one of the two. A memory's keys are of what the weights make of a prompt: were patches of weights beneath
it, none of them could come off without spoiling the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, final

from lfm.core import registry
from lfm.core.config import configure
from lfm.core.errors import ConfigError
from lfm.core.heavy import F
from lfm.core.interfaces import Adaptation, LowRank
from lfm.core.method import Kept
from lfm.core.model import Model
from lfm.data.records import Edit
from lfm.editing.memory import same
from lfm.models.combine import inner, overlap
from lfm.models.program import open_program, program
from lfm.runs import ledger, refs

if TYPE_CHECKING:
    from torch import Tensor

P = TypeVar("P")

MEMORY = "memory"
"""The role that an editor takes its earlier memory by."""


PLACE = "layer"
"""The setting that says where a memory lies; the memory itself tells it from then on."""


class Moved(NamedTuple):
    """What a patch changes in one place, a module or a memory: its rank or its number of edits, and ‖ΔW‖_F.

    overlap: by patch, the cosine of the two changes; reads: of the keys that are nearest, or of the inputs acted on.
    """

    module: str
    rank: int
    norm: float | None
    overlap: Mapping[int, float]
    reads: Mapping[int, float]


@final
@dataclass(frozen=True)
class Stack(Generic[P]):
    """How patches of one kind are handled.

    method: whose memory it is, "" for changes of weights. form: what patches are saved as. held: what a model holds;
    opened: the model saved in a directory over a base. whole: what several hold together, in order; beyond: what the
    second has that the first (None: nothing) has not; cleared: the first without what contradicts the second, None
    where nothing is left; empty: what is left where no patch is on, None for nothing; over: base, what is held,
    settings → the model; edits: those that it keeps, None where it does not tell; moved: one patch beside others by
    number.
    """

    method: str
    form: str
    held: Callable[[Model], P]
    opened: Callable[[Path, Model], Model]
    whole: Callable[[Sequence[P]], P]
    beyond: Callable[[P | None, P], P]
    cleared: Callable[[P, P], P | None]
    empty: Callable[[P], P | None]
    over: Callable[[Model, P, Mapping[str, Any]], Model]
    edits: Callable[[P], tuple[Edit, ...] | None]
    moved: Callable[[P, Mapping[int, P]], list[Moved]]

    def models(self, base: str, before: str | Model | None) -> dict[str, tuple[str | Model, ...]]:
        """What fills the roles of a method that goes on from what was made before."""
        if not self.method:
            return {"model": (before or base,)}
        return {"model": (base,)} | ({MEMORY: (before,)} if before else {})


def of_method(id: str) -> Stack[Any]:
    """How what an editor makes is kept. ConfigError, before it runs, for what cannot be taken off again."""
    method = registry.get(id).method
    if method.kept and "edits" in method.data:
        return _of_memory(id, method.kept)
    if "adapter" in method.forms and "edits" in method.data:
        return WEIGHTS
    if "edits" not in method.data:
        what, why = f"{id} is no editor of facts", "it takes no edits"
    else:
        why = f"it can be saved as {' or '.join(method.forms)} alone" if method.forms else "it is not known to be"
        what, why = f"what {id} makes is not for a ledger", f"no change of low rank: {why}"
    fix = f"--by one of {', '.join(editors())}"
    raise ConfigError(what, why=why, fix=fix if "edits" not in method.data else f"`lfm run {id} …`, or {fix}")


def settled(id: str, given: Mapping[str, Any], first: Mapping[str, Any], held: Any, blocks: int) -> dict[str, Any]:
    """The settings by which a memory of that many blocks' model grows: those given, and what holds for the whole of it.

    ConfigError where one that was given says otherwise. first: an earlier patch's settings; held: the memory.
    """
    method = registry.get(id).method
    fixed = {name: first[name] for name in (method.kept.settled if method.kept else ()) if name in first}
    config = configure(method.config, given, where=id)
    for name in given:
        asked, known = getattr(config, name), fixed.get(name)
        if name == PLACE and asked is not None and hasattr(held, "block"):
            known, asked = held.block, asked + blocks if asked < 0 else asked
        elif name not in fixed:
            continue
        if asked != known:
            raise ConfigError(
                f"{name}={given[name]} is not what the ledger's memory has",
                why=f"its first patch settled it: {name}={known}",
                fix=f"leave {name} out, or begin another ledger",
            )
    return {**fixed, **{name: value for name, value in given.items() if name != PLACE}}


def editors() -> list[str]:
    """Ids of all methods whose edits a ledger can hold."""
    found = ((id, registry.get(id).method) for id in registry.ids())
    return sorted(id for id, m in found if "edits" in m.data and (m.kept or "adapter" in m.forms))


def _of_memory(id: str, kept: Kept[Any]) -> Stack[Any]:
    method = registry.get(id).method
    assert method.open is not None, "a memory is a program"
    open = method.open

    def beyond(before: Any, after: Any) -> Any:
        if before is None:
            return after
        fresh = [i for i, edit in enumerate(after.edits) if not any(same(edit, known) for known in before.edits)]
        return kept.taken(after, fresh)

    def cleared(held: Any, other: Any) -> Any:
        new = {edit.prompt: edit.new_object.strip() for edit in other.edits}
        left = [i for i, e in enumerate(held.edits) if new.get(e.prompt, e.new_object.strip()) == e.new_object.strip()]
        return kept.taken(held, left) if left else None

    def over(base: Model, held: Any, settings: Mapping[str, Any]) -> Model:
        asked = {name: value for name, value in settings.items() if name in kept.settled}
        return program(id, configure(method.config, asked, where=id), held.parts(base), open)

    def moved(mine: Any, others: Mapping[int, Any]) -> list[Moved]:
        if kept.keys is None:
            return [Moved(MEMORY, len(mine.edits), None, {}, {})]
        keys = {number: kept.keys(other) for number, other in others.items()}
        own = kept.keys(mine)
        return [
            Moved(MEMORY, len(mine.edits), None, {}, {number: _nearest(own, each) for number, each in keys.items()})
        ]

    return Stack(
        method=id,
        form="program",
        held=lambda model: model.ask(kept.kind),
        whole=lambda parts: reduce(kept.learn, parts),
        opened=_program,
        beyond=beyond,
        cleared=cleared,
        empty=lambda held: kept.taken(held, ()),
        over=over,
        edits=lambda held: tuple(held.edits),
        moved=moved,
    )


def _program(place: Path, base: Model) -> Model:
    def part(ref: str, digest: str) -> Model:
        if digest == base.digest:
            return base
        return refs.model((None if Path(ref).exists() else ledger.find(digest)) or ref)

    return open_program(place, part)


def _adapter(place: Path, base: Model) -> Model:
    from lfm.models.adapter import open_adapter

    return open_adapter(place, lambda ref, digest: base)


def _nearest(one: Tensor, other: Tensor) -> float:
    """The largest cosine between a row (n, d) and a row (m, d)."""
    return float((F.normalize(one.double(), dim=1) @ F.normalize(other.double(), dim=1).T).max())


def _joined(parts: Sequence[Mapping[str, LowRank]]) -> dict[str, LowRank]:
    """Their sum, factors side by side in their order."""
    from lfm.tensors.lowrank import joined

    found: dict[str, list[LowRank]] = {}
    for part in parts:
        for name, change in part.items():
            found.setdefault(name, []).append(change)
    return {name: joined(changes, [1.0] * len(changes)) for name, changes in found.items()}


def _added(before: Mapping[str, LowRank] | None, after: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """What changes have beside earlier ones, whose factors they begin with."""
    parts = {name: _beyond((before or {}).get(name), change) for name, change in after.items()}
    return {name: part for name, part in parts.items() if part is not None}


def _beyond(before: LowRank | None, change: LowRank) -> LowRank | None:
    first = before.a.shape[0] if before is not None else 0
    assert before is None or (change.a[:first].double() == before.a.double()).all(), "patches go on top of each other"
    return change._replace(b=change.b[:, first:], a=change.a[first:]) if change.a.shape[0] > first else None


def _adapted(base: Model, changes: Mapping[str, LowRank], settings: Mapping[str, Any]) -> Model:
    from lfm.models.adapter import of_changes

    return of_changes(base, changes, {})


def _changed(mine: Mapping[str, LowRank], others: Mapping[int, Mapping[str, LowRank]]) -> list[Moved]:
    found = []
    for name, change in sorted(mine.items()):
        near = {
            number: overlap({name: change}, {name: theirs[name]}) for number, theirs in others.items() if name in theirs
        }
        cosines, reads = ({number: each[i] for number, each in near.items()} for i in range(2))
        found.append(Moved(name, change.a.shape[0], inner(change, change) ** 0.5, cosines, reads))
    return found


WEIGHTS: Stack[Any] = Stack(
    method="",
    form="adapter",
    held=lambda model: model.ask(Adaptation).changes(),
    whole=_joined,
    opened=_adapter,
    beyond=_added,
    cleared=lambda changes, other: changes,
    empty=lambda changes: None,
    over=_adapted,
    edits=lambda changes: None,
    moved=_changed,
)
