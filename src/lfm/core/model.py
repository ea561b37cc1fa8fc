"""A model is the set of interfaces it gives; nothing is read until one is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast, final

from lfm.core.errors import AccessError, OutputError
from lfm.core.interfaces import name_of, names_of

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor

I = TypeVar("I")


class Facts(NamedTuple):
    """What is known of a model before any weight is read: the plan and the early checks rest on it."""

    task: str = ""  # causal-lm, masked-lm, seq2seq-lm, {text,image,audio}-classification, encoder
    architecture: str = ""
    parameters: int = 0
    bytes: int = 0
    dtype: str = ""
    vocabulary: int = 0
    vocabulary_digest: str = ""
    labels: tuple[str, ...] = ()
    layers: int = 0
    width: int = 0
    heads: int = 0
    context: int = 0  # the longest input in tokens; 0: not known
    image: tuple[int, ...] = ()  # channels, height, width of the pictures that it reads; empty: none, or not known


SUBJECTS = {"api": "this endpoint", "answers": "this cache of a teacher's answers"}
"""What errors call a model of a kind; "this KIND" where it is not here."""


@final
@dataclass(frozen=True)
class Model:
    """A model: where it came from, what it gives, how it is identified and written.

    gives: interface → how to open it. identify: computes the digest. formats: name → writer; the first is the default,
    and one that writes another model's numbers returns that model.
    """

    ref: str
    kind: str  # checkpoint, adapter, api, program, module
    gives: Mapping[type, Callable[[], Any]]
    identify: Callable[[], str]
    formats: Mapping[str, Callable[[Path], Model | None]] = field(default_factory=dict)
    look: Callable[[], Facts] = Facts
    hint: str = ""  # why it gives less than one might expect
    instead: str = ""  # what to give in its place, where that would give more
    restore: Mapping[str, LazyTensor] = field(default_factory=dict)  # what its base held in place of what it changed
    _opened: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def __repr__(self) -> str:
        return f"Model({self.ref!r}, {self.kind}: {', '.join(names_of(self.gives)) or 'nothing'})"

    @property
    def digest(self) -> str:
        """sha256 over content: equal models have equal digests wherever they lie."""
        if "digest" not in self._opened:
            self._opened["digest"] = self.identify()
        return self._opened["digest"]

    @property
    def facts(self) -> Facts:
        if "facts" not in self._opened:
            self._opened["facts"] = self.look()
        return self._opened["facts"]

    @property
    def subject(self) -> str:
        """What errors call it: "this checkpoint"."""
        return SUBJECTS.get(self.kind, f"this {self.kind}")

    @property
    def offers(self) -> str:
        """What it gives, as errors say it: "this checkpoint gives codec, logits"."""
        return f"{self.subject} gives {', '.join(names_of(self.gives)) or 'nothing'}"

    def can(self, *kinds: type) -> bool:
        return all(kind in self.gives for kind in kinds)

    def ask(self, kind: type[I]) -> I:
        """Open an interface (once). AccessError if this model does not give it."""
        if kind not in self.gives:
            have = ",".join(names_of(self.gives))
            raise AccessError(
                f"{self.ref} does not give {name_of(kind)}",
                why=self.offers + (f" ({self.hint})" if self.hint else ""),
                fix=have and f"`lfm methods --have {have}` lists what works with it",
            )
        if kind not in self._opened:
            self._opened[kind] = self.gives[kind]()
        return cast("I", self._opened[kind])

    def only(self, kinds: Iterable[type]) -> Model:
        """The same model giving no more than these interfaces, and nothing to save it by."""
        wanted = set(kinds)
        given = {kind: (lambda kind=kind: self.ask(kind)) for kind in self.gives if kind in wanted}
        same = {"identify": lambda: self.digest, "look": lambda: self.facts}
        return replace(self, gives=given, formats={}, restore={}, _opened={}, **same)

    def save(self, out: Path, form: str = "") -> Model:
        """Write the artefact into the existing, empty directory `out`; the default format unless one is named.

        Returns the model that was written: another where the format rounds, as a merged adapter's weights.
        """
        if not self.formats:
            raise OutputError(f"{self.ref} cannot be saved", why=f"{self.subject} has no files of its own")
        if form and form not in self.formats:
            raise OutputError(f"{self.ref} has no format {form!r}", fix=f"formats: {', '.join(self.formats)}")
        return self.formats[form or next(iter(self.formats))](out) or self
