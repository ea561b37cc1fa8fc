"""Whether models' tensors go together, before any of them is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from lfm.core.errors import MismatchError
from lfm.core.interfaces import Weights
from lfm.core.model import Model
from lfm.tensors.lazy import code_of, coded, size, spans
from lfm.tensors.safetensors_file import DTYPES, FLOATING

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


def agree(models: Sequence[Model]) -> None:
    """MismatchError unless all have the first one's architecture, vocabulary, tensor names and shapes. Reads headers.

    Tied weights that one model stores and another does not are a mismatch too: nothing is dropped silently.
    """
    first = models[0]
    for other in models[1:]:
        _agree_facts(first, other)
        _agree_tensors(first, other)


def floating(tensors: Mapping[str, LazyTensor]) -> list[str]:
    """Names of the tensors that arithmetic applies to."""
    return [name for name, tensor in tensors.items() if code_of(tensor) in FLOATING]


def same(names: Iterable[str], models: Sequence[Model]) -> None:
    """MismatchError unless these tensors (integers, which no average is meant for) hold the same in every model."""
    first, *others = (model.ask(Weights).tensors() for model in models)
    for name in sorted(names):
        for model, other in zip(models[1:], others):
            if not equal(first[name], other[name]):
                raise MismatchError(
                    f"{name!r} differs between {models[0].ref} and {model.ref}",
                    why=f"it holds {DTYPES[code_of(first[name])][0]} values, which cannot be averaged",
                )


def equal(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors of one shape hold the same bytes, in formats that are the same."""
    left, right = coded(a), coded(b)
    if left.code != right.code or tuple(a.shape) != tuple(b.shape):
        return False
    item = DTYPES[left.code][1]
    for start, stop in spans(size(a)):
        one, other = (bytearray((stop - start) * item) for _ in range(2))
        left.read_into(memoryview(one), start * item)
        right.read_into(memoryview(other), start * item)
        if one != other:
            return False
    return True


def _agree_facts(first: Model, other: Model) -> None:
    a, b = first.facts, other.facts
    if a.architecture and b.architecture and a.architecture != b.architecture:
        _refuse(first, other, f"architectures: {a.architecture} and {b.architecture}")
    if a.vocabulary and b.vocabulary and a.vocabulary != b.vocabulary:
        _refuse(first, other, f"vocabularies: {a.vocabulary} and {b.vocabulary} tokens")
    if a.vocabulary_digest and b.vocabulary_digest and a.vocabulary_digest != b.vocabulary_digest:
        _refuse(first, other, "vocabularies: as many tokens, but not the same ones under the same ids")
    for what in ("layers", "width", "heads"):
        mine, theirs = getattr(a, what), getattr(b, what)
        if mine and theirs and mine != theirs:
            _refuse(first, other, f"{what}: {mine} and {theirs}, by their config.json")
    if a.labels != b.labels and sorted(a.labels) == sorted(b.labels):
        _refuse(first, other, f"labels' order: {', '.join(a.labels[:4])} and {', '.join(b.labels[:4])}")


def _agree_tensors(first: Model, other: Model) -> None:
    a, b = first.ask(Weights).tensors(), other.ask(Weights).tensors()
    for ref, names in ((first.ref, a.keys() - b.keys()), (other.ref, b.keys() - a.keys())):
        if names:
            _refuse(
                first,
                other,
                f"tensors: {some(names)} only in {ref}",
                "each tensor needs its counterpart; where a model ties two tensors and stores one, save all models so",
            )
    shapes = [
        f"{name} {list(a[name].shape)} against {list(b[name].shape)}"
        for name in a
        if tuple(a[name].shape) != tuple(b[name].shape)
    ]
    if shapes:
        _refuse(first, other, f"shapes: {'; '.join(shapes[:3])}{_more(len(shapes))}")
    kinds = [name for name in a if (code_of(a[name]) in FLOATING) != (code_of(b[name]) in FLOATING)]
    if kinds:
        _refuse(first, other, f"dtypes: {some(kinds)} floating in one and integer in the other")


def _refuse(
    first: Model, other: Model, why: str, fix: str = "models of one architecture and vocabulary go together"
) -> None:
    raise MismatchError(f"{first.ref} and {other.ref} do not go together", why=f"they differ in {why}", fix=fix)


def some(names: Iterable[str]) -> str:
    """The first three of these names, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(islice(ordered, 3)) + _more(len(ordered))


def _more(count: int) -> str:
    return f" and {count - 3} more" if count > 3 else ""
