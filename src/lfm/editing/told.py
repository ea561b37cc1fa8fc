"""Edits in words, and examples of how they are used: what a model is told before a prompt, its weights as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

import msgspec

from lfm.core.heavy import torch
from lfm.core.method import Parts
from lfm.core.model import Model
from lfm.data.records import Edit
from lfm.editing import memory

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True)
class Told:
    """Edits in words, and examples: number says of each edit, and whose of each example, in which run it was given.

    A program that has them gives them as an interface. base: digest of the model beneath. vectors: where there is a
    retriever, "facts" and "examples" as it sees them, row by row.
    """

    base: str
    edits: tuple[Edit, ...]
    number: tuple[int, ...]
    examples: tuple[tuple[str, ...], ...]
    whose: tuple[int, ...]
    vectors: Mapping[str, Tensor]
    retriever: tuple[Model, ...] = ()

    def parts(self, model: Model) -> Parts:
        """As a program's parts."""
        state = {
            "base": self.base,
            "edits": [msgspec.to_builtins(edit) for edit in self.edits],
            "number": list(self.number),
            "examples": [list(example) for example in self.examples],
            "whose": list(self.whose),
        }
        return Parts(self.beside(model), self.vectors, state)

    def beside(self, model: Model) -> dict[str, tuple[Model, ...]]:
        """The model and, where there is one, the retriever, by role."""
        return {"model": (model,)} | ({"retriever": self.retriever} if self.retriever else {})


def opened(parts: Parts) -> Told:
    """What was told, of a program's parts."""
    state = parts.state
    edits = tuple(msgspec.convert(edit, Edit) for edit in state["edits"])
    examples = tuple(tuple(example) for example in state["examples"])
    told = Told(state["base"], edits, tuple(state["number"]), examples, tuple(state["whose"]), parts.tensors)
    return replace(told, retriever=parts.models.get("retriever", ()))


def learn(told: Told, more: Told) -> Told:
    """With the other's edits and examples too. DataError where one contradicts another."""
    if not told.edits:
        return more
    added = taken(more, memory.unknown(told.edits, more.edits))
    first = 1 + max(told.number)
    return Told(
        told.base,
        told.edits + added.edits,
        (*told.number, *(first + number for number in added.number)),
        told.examples + added.examples,
        (*told.whose, *(first + number for number in added.whose)),
        {name: torch.cat([held, added.vectors[name]]) for name, held in told.vectors.items()},
        told.retriever,
    )


def taken(told: Told, places: Sequence[int]) -> Told:
    """The edits at these places, and the examples of runs of which one is left."""
    left = sorted({told.number[i] for i in places})
    examples = [i for i, number in enumerate(told.whose) if number in left]
    rows = {"facts": list(places), "examples": examples}
    return replace(
        told,
        edits=tuple(told.edits[i] for i in places),
        number=tuple(left.index(told.number[i]) for i in places),
        examples=tuple(told.examples[i] for i in examples),
        whose=tuple(left.index(told.whose[i]) for i in examples),
        vectors={name: held[rows[name]] for name, held in told.vectors.items()},
    )
