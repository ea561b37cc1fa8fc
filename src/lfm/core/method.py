"""A method maps models (and a little data) to a model, or to a finding about them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar, final

from lfm.core.config import Config
from lfm.core.errors import AccessError, DataError, SlotError
from lfm.core.finding import Finding
from lfm.core.interfaces import names_of
from lfm.core.model import Facts, Model

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lfm.core.interfaces import LazyTensor

C = TypeVar("C", bound=Config)
T = TypeVar("T")
K = TypeVar("K")


class Data(IntEnum):
    """How much a method asks of a data role, from the least to the most."""

    NONE = 0
    UNLABELED = 1  # text or images as they come
    FEW_SHOT = 2  # a few labelled examples a class, or a few facts
    LABELED = 3  # a training set


@final
@dataclass(frozen=True)
class Slot:
    """One role that models play, and the interfaces asked of each. max None: any number.

    any_of: at least one of these is asked for too; all of them that a model gives are used. also: used where given,
    and no condition.
    """

    needs: tuple[type, ...]
    min: int = 1
    max: int | None = 1
    help: str = ""
    any_of: tuple[type, ...] = ()
    also: tuple[type, ...] = ()

    @property
    def declared(self) -> tuple[type, ...]:
        """All that the method may ask a model for."""
        return (*self.needs, *self.any_of, *self.also)

    def missing(self, given: Collection[type]) -> list[type]:
        """What a model that gives these lacks; of alternatives, all of them where there is none."""
        lacks = [kind for kind in self.needs if kind not in given]
        return lacks + ([] if any(kind in given for kind in self.any_of) else list(self.any_of))

    @property
    def asked(self) -> list[str]:
        """The interfaces' names; alternatives are one: "logprobs or top or text"."""
        return [*names_of(self.needs), *([" or ".join(reversed(names_of(self.any_of)))] if self.any_of else [])]


@final
@dataclass(frozen=True)
class DataSlot:
    """One role that records play. kinds: the record kinds understood (tags of lfm.data.records)."""

    level: Data
    kinds: tuple[str, ...] = ()
    optional: bool = False
    help: str = ""


class Amount(NamedTuple):
    """How much data fills a role: known before a model is loaded."""

    records: int
    tokens: int


class Sizes(NamedTuple):
    """What a cost estimate rests on: facts of the models and amounts of the data, by role."""

    models: Mapping[str, tuple[Facts, ...]]
    data: Mapping[str, Amount]
    gives: Mapping[str, tuple[Collection[type], ...]] = MappingProxyType({})  # what each model can be asked
    labels: Mapping[str, int] = MappingProxyType({})  # how many different ones a role's records have
    # (role of records, role of a model) → how many questions ask about each token that the records score the model on,
    # and how many tokens those are; None where it is no causal one with a tokenizer. Counted when asked for
    questions: Callable[[str, str], tuple[int, int] | None] = lambda records, model: None

    def model(self, role: str) -> Facts:
        return self.models[role][0]


class Cost(NamedTuple):
    """What a run will take. flops: arithmetic; steps: sequential passes (each has a fixed overhead); bytes; API use.

    each: queries that what is made takes for a record; 0: as many as there are classes, at most.
    light: torch is not loaded for stored floating weights, and memory is so many bytes by the threads there are.
    """

    flops: float = 0.0
    steps: int = 0
    memory: int = 0
    disk: int = 0
    queries: int = 0
    tokens: int = 0
    light: bool = False
    each: int = 0


@final
@dataclass(frozen=True)
class Inputs:
    """The checked models and records by role. Each model gives what its slot declares, and nothing else."""

    models: Mapping[str, tuple[Model, ...]]
    data: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def model(self, role: str) -> Model:
        return self.models[role][0]

    def all(self, role: str) -> tuple[Model, ...]:
        return self.models.get(role, ())

    def records(self, role: str) -> Sequence[Any]:
        """The role's records; empty where the role is optional and was not given."""
        return self.data.get(role, ())


NAMED = 8
"""Methods that an error names."""

METRICS = "metrics.jsonl"
"""What trainings tell of their steps, in a run's scratch directory, and then in what it makes."""

RECORDS = "records.jsonl"
"""What a method made to learn from, in a run's scratch directory, and then in what it makes: data for other methods."""


class Run(Protocol):
    """What a run hands to a method: randomness, progress, journalled steps."""

    @property
    def seed(self) -> int: ...

    @property
    def work(self) -> Path:
        """A directory that outlives a kill and goes with the run's end."""
        ...

    def step(self, name: str, fn: Callable[[], T]) -> T:
        """fn's result, kept on disk: after an interruption the same name gives the kept result.

        The result is made of None, bool, int, float, str, list, tuple (kept as list), dict with str keys, and tensors.
        """
        ...

    def once(self, name: str, fn: Callable[[], T]) -> T:
        """As step, for what one process can do alone (asking, drawing): of several one does it, and all read it."""
        ...

    def track(
        self, items: Iterable[T], label: str, total: int | None = None, beside: Callable[[], str] = str
    ) -> Iterator[T]:
        """The items, with progress, an estimate of the time left, and what `beside` says after each.

        Of range(k, total) it is counted from k: so much was done before.
        """
        ...

    def note(self, **numbers: float | str) -> None:
        """Numbers for run.json and beside the progress."""
        ...

    def curve(self, name: str, value: float) -> None:
        """One more point of a curve for the report."""
        ...

    def seed_for(self, *key: object) -> int:
        """A 63-bit seed keyed by the run's seed and the key, the same on every machine."""
        ...

    def generator(self, *key: object) -> torch.Generator:
        """A CPU generator seeded by seed_for(key)."""
        ...


@final
@dataclass(frozen=True)
class Parts:
    """A saved program's contents: its part models by role, its own tensors, and plain state."""

    models: Mapping[str, tuple[Model, ...]]
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]

    def model(self, role: str) -> Model:
        return self.models[role][0]


@final
@dataclass(frozen=True)
class Kept(Generic[K]):
    """What a method's programs keep of each edit by itself, so that any edit comes off again: what a ledger holds.

    kind: the interface by which they give it and the method's slot "memory" takes it; it has `edits`, and the program's
    `parts(model)`. learn: one with the other's edits too; taken: the edits at these places alone, all else as it is;
    keys: by which edits are met, row by row, where they are vectors; settled: settings of it as a whole, its shape and
    how it is read, which are the first edits' and which all others go by.
    """

    kind: type[K]
    learn: Callable[[K, K], K]
    taken: Callable[[K, Sequence[int]], K]
    keys: Callable[[K], Tensor] | None = None
    settled: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class Method(Generic[C]):
    """One system: what it asks for, what it costs, and the function that does it.

    agree: raises before any weight is read if the inputs cannot go together.
    open: the interfaces of a program that run made, from its parts; they are all that is needed to bring it back.
    disk: bytes of the result, by the inputs' headers, where facts alone do not tell; cost's stands where it is None.
    origin: what each tensor of the result is a change of, read from headers; where it is None, the base's of that name.
    merge: what run does to weights, with settings by tensor (lfm.fusing.inputs.Merge): recipes of slices drive it.
    forms: all that its result can be saved as, whatever the inputs; others are refused before the run. Empty: any.
    formed: those of them that there are with these settings, where that is not all.
    kept: of an editor beside the weights, what its programs keep of each edit; None where no edit comes off by itself.
    """

    paper: str
    config: type[C]
    models: Mapping[str, Slot]
    run: Callable[[C, Inputs, Run], Model | Finding]
    cost: Callable[[C, Sizes], Cost]
    data: Mapping[str, DataSlot] = field(default_factory=dict)
    agree: Callable[[C, Inputs], None] | None = None
    open: Callable[[C, Parts], Mapping[type, Callable[[], Any]]] | None = None
    gives: str = "model"  # or "finding"
    merge: Callable[..., dict[str, LazyTensor]] | None = None
    disk: Callable[[C, Inputs], int] | None = None
    origin: Callable[[C, Inputs], Mapping[str, LazyTensor]] | None = None
    forms: tuple[str, ...] = ()
    formed: Callable[[C], tuple[str, ...]] | None = None
    kept: Kept[Any] | None = None

    @property
    def level(self) -> Data:
        """The most asked of any required data role."""
        return max((slot.level for slot in self.data.values() if not slot.optional), default=Data.NONE)


def check(id: str, method: Method[Any], inputs: Inputs, *, alternatives: Callable[[], Sequence[str]] = list) -> Inputs:
    """The inputs restricted to what the method declares, or the first error. Opens no interface.

    alternatives: ids that would work with what the models give; named in an AccessError.
    """
    for role in inputs.models:
        if role not in method.models:
            raise SlotError(f"{id} has no model slot {role!r}", fix=f"its slots: {', '.join(method.models)}")
    for role in inputs.data:
        if role not in method.data:
            raise SlotError(f"{id} has no data slot {role!r}", fix=f"its slots: {', '.join(method.data) or 'none'}")
    for role, slot in method.models.items():
        given = inputs.all(role)
        if len(given) < slot.min:
            raise SlotError(
                f"{id} needs {slot.min if slot.min > 1 else 'a'} model{'s' if slot.min > 1 else ''} for {role!r}"
                f", got {len(given) or 'none'}",
                why=f"{slot.help + '; ' if slot.help else ''}it must give {', '.join(slot.asked)}",
                fix=f"add {role}=REF",
            )
        if slot.max is not None and len(given) > slot.max:
            raise SlotError(f"{id} takes at most {slot.max} for {role!r}, got {len(given)}")
        for model in given:
            if missing := slot.missing(model.gives.keys()):
                others = [other for other in alternatives() if other != id]
                lacks = Slot(
                    tuple(kind for kind in slot.needs if kind in missing),
                    any_of=tuple(kind for kind in slot.any_of if kind in missing),
                )
                raise AccessError(
                    f"{id} asks {', '.join(lacks.asked)} of {role!r}, which {model.ref} does not give",
                    why=(f"{model.hint}; " if model.hint else "") + model.offers,
                    fix="; ".join(filter(None, [model.instead and f"{role}={model.instead}", _others(model, others)])),
                )
    for role, slot in method.data.items():
        records = inputs.records(role)
        if not len(records):
            if slot.optional:
                continue
            raise SlotError(
                f"{id} needs data for {role!r}",
                why=slot.help,
                fix=f"add {role}=FILE with records of kind {' or '.join(slot.kinds) or 'any'}",
            )
        kind = type(records[0]).__struct_config__.tag
        if slot.kinds and kind not in slot.kinds:
            raise DataError(
                f"{id} reads {' or '.join(slot.kinds)} records for {role!r}, these are {kind}",
                fix="docs/data.md shows each kind as one line of JSON",
            )
    restricted = {
        role: tuple(m.only(method.models[role].declared) for m in given) for role, given in inputs.models.items()
    }
    return Inputs(restricted, dict(inputs.data))


def _others(model: Model, ids: Sequence[str]) -> str:
    """What would work with a model: a few ids, and how to list them all."""
    more = f" and {len(ids) - NAMED} more (`lfm methods --have {','.join(names_of(model.gives))}`)"
    return f"methods that work with it: {', '.join(ids[:NAMED])}{more * (len(ids) > NAMED)}" if ids else ""
