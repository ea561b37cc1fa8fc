"""Axes of tensors as sums and products of smaller axes, and what unifying them says: the algebra under a trace.

An axis is a leaf, a product (row-major: heads × head width) or a sum (one after another: queries, keys, values). Leaves
that are unified must be permuted alike; pinned ones must not be permuted. What cannot be told apart is pinned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import TYPE_CHECKING, final

from lfm.core.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor


class UnclearError(Exception):
    """What an operation does to its axes does not fit their sizes."""


@final
class Axis:
    """One axis, or one that was unified with it (`find`). parts: of a sum or product, by `kind`; of a leaf none."""

    __slots__ = ("forward", "kind", "parts", "pinned", "size")

    def __init__(self, size: int, pinned: bool = False) -> None:
        self.size, self.pinned = size, pinned or size == 1
        self.kind = "leaf"
        self.parts: tuple[Axis, ...] = ()
        self.forward: Axis | None = None


def find(axis: Axis) -> Axis:
    """What the axis stands for by now."""
    while axis.forward is not None:
        if axis.forward.forward is not None:
            axis.forward = axis.forward.forward
        axis = axis.forward
    return axis


def fixed(shape: Iterable[int]) -> tuple[Axis, ...]:
    return tuple(Axis(size, True) for size in shape)


def free(shape: Iterable[int]) -> tuple[Axis, ...]:
    return tuple(Axis(size) for size in shape)


def pin(axis: Axis) -> None:
    """The axis must not be permuted, nor any part of it."""
    axis = find(axis)
    axis.pinned = axis.kind == "leaf"
    for part in axis.parts:
        pin(part)


def leaves(axis: Axis) -> list[Axis]:
    axis = find(axis)
    return [axis] if axis.kind == "leaf" else [leaf for part in axis.parts for leaf in leaves(part)]


def factors(axis: Axis) -> list[Axis]:
    """The leaves and sums whose product the axis is, outermost first; none of size one."""
    axis = find(axis)
    if axis.kind == "product":
        return [factor for part in axis.parts for factor in factors(part)]
    return [axis] if axis.size > 1 else []


def summands(axis: Axis) -> list[Axis]:
    axis = find(axis)
    return [s for part in axis.parts for s in summands(part)] if axis.kind == "sum" else [axis]


def product(parts: Sequence[Axis]) -> Axis:
    """The axis whose elements are the parts' combinations, the last running fastest."""
    return _made("product", [factor for part in parts for factor in factors(part)])


def total(parts: Sequence[Axis]) -> Axis:
    """The axis in which the parts follow each other."""
    return _made("sum", [summand for part in parts if find(part).size for summand in summands(part)])


def _made(kind: str, parts: list[Axis]) -> Axis:
    if len(parts) == 1:
        return parts[0]
    sizes = [part.size for part in parts]
    axis = Axis(prod(sizes) if kind == "product" else sum(sizes), pinned=not parts)
    if parts:
        axis.kind, axis.parts, axis.pinned = kind, tuple(parts), False
    return axis


def _refine(leaf: Axis, kind: str, sizes: Sequence[int]) -> tuple[Axis, ...]:
    leaf.kind, leaf.parts = kind, tuple(Axis(size, leaf.pinned) for size in sizes)
    leaf.pinned = False
    return leaf.parts


def unify(a: Axis, b: Axis) -> None:
    """Both are one axis from here on: what permutes one permutes the other."""
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        raise UnclearError
    if a.kind == "leaf" or b.kind == "leaf":
        leaf, other = (a, b) if a.kind == "leaf" else (b, a)
        leaf.forward = other
        if leaf.pinned:
            pin(other)
    elif a.kind == b.kind == "sum":
        marks = sorted({*_marks(a), *_marks(b)})
        for one, other in zip(cut(a, marks), cut(b, marks)):
            unify(one, other)
    elif a.kind == b.kind == "product":
        _unify_products(a, b)
    else:
        one, other = (a, b) if a.kind == "sum" else (b, a)
        for part, piece in zip(summands(one), cut(other, _marks(one))):
            unify(part, piece)


def _unify_products(a: Axis, b: Axis) -> None:
    """Factor by factor from the outermost, a larger one split where the other has a border inside it."""
    left, right = factors(a), factors(b)
    while left and right:
        one, other = find(left.pop(0)), find(right.pop(0))
        if "product" in (one.kind, other.kind):  # refined by an earlier step of this loop
            left[:0], right[:0] = factors(one), factors(other)
        elif one.size == other.size:
            unify(one, other)
        else:
            big, size, rest = (one, other.size, left) if one.size > other.size else (other, one.size, right)
            pieces = _split(big, size)
            if pieces is None:
                pin(a)
                pin(b)
                return
            unify(pieces[0], other if big is one else one)
            rest.insert(0, pieces[1])


def _split(axis: Axis, outer: int) -> tuple[Axis, Axis] | None:
    """A leaf or sum as a product whose outer factor has `outer` elements; None (and pinned) where it is none."""
    axis = find(axis)
    if axis.size % outer == 0 and axis.kind == "leaf":
        first, second = _refine(axis, "product", (outer, axis.size // outer))
        return first, second
    if axis.kind == "sum" and len({part.size for part in map(find, axis.parts)}) == 1 and outer == len(axis.parts):
        for part in axis.parts[1:]:
            unify(axis.parts[0], part)
        pieces = Axis(outer, True), axis.parts[0]
        axis.kind, axis.parts = "product", pieces
        return pieces
    pin(axis)
    return None


def _marks(axis: Axis) -> list[int]:
    return list(accumulate(part.size for part in summands(axis)))


def cut(axis: Axis, ends: Sequence[int]) -> list[Axis]:
    """The pieces of an axis that end at these places, in order; the last is its size."""
    axis = find(axis)
    if ends[-1] != axis.size:
        raise UnclearError
    sizes = [end - start for start, end in pairwise([0, *ends])]
    if len(ends) == 1:
        return [axis]
    if axis.kind == "leaf":
        return list(_refine(axis, "sum", sizes))
    if axis.kind == "sum":
        pieces, start = [], 0
        for part in summands(axis):
            inside = [end - start for end in ends if start < end < start + part.size]
            pieces += cut(part, [*inside, part.size])
            start += part.size
        out: list[list[Axis]] = [[] for _ in ends]
        place = 0
        for piece in pieces:
            place += piece.size
            out[next(i for i, end in enumerate(ends) if place <= end)].append(piece)
        return [total(group) for group in out]
    first, *rest = factors(axis)
    inner = prod(find(f).size for f in rest)
    if all(end % inner == 0 for end in ends):
        return [product([piece, *rest]) for piece in cut(first, [end // inner for end in ends])]
    pin(axis)
    return list(fixed(sizes))


def viewed(axes: Sequence[Axis], shape: Sequence[int]) -> tuple[Axis, ...]:
    """The axes of the same elements in another row-major shape."""
    if 0 in shape:
        return fixed(shape)
    left = [factor for axis in axes for factor in factors(axis)]
    made = []
    for size in shape:
        taken: list[Axis] = []
        missing = size
        while missing > 1:
            factor = find(left.pop(0))
            if factor.kind == "product":
                left[:0] = factors(factor)
                continue
            if missing % factor.size:
                pieces = _split(factor, missing)
                if pieces is None:
                    for axis in axes:
                        pin(axis)
                    return fixed(shape)
                left.insert(0, pieces[1])
                factor = find(pieces[0])
            taken.append(factor)
            missing //= factor.size
        made.append(product(taken))
    return tuple(made)


def terms(axes: Sequence[Axis], limit: int = 512) -> list[list[Axis]]:
    """A tensor's axes multiplied out: each term the leaves that one of its corners, cut along all sums, varies over.

    More than `limit` terms: none, which callers take for not known.
    """
    found: list[list[Axis]] = [[]]
    for axis in axes:
        own = _terms(axis)
        if len(found) * len(own) > limit:
            return []
        found = [[*term, *more] for term in found for more in own]
    return found


def _terms(axis: Axis) -> list[list[Axis]]:
    axis = find(axis)
    if axis.kind == "leaf":
        return [[axis] if axis.size > 1 else []]
    if axis.kind == "sum":
        return [term for part in axis.parts for term in _terms(part)]
    return terms(axis.parts)


def places(axis: Axis) -> dict[Axis, Tensor]:
    """For each leaf: where on it each element of the axis lies, (size,) int64; -1 where it does not lie on it.

    A leaf that the axis varies over twice at once (a flattened square) is pinned.
    """
    axis = find(axis)
    if axis.kind == "leaf":
        return {axis: torch.arange(axis.size)}
    found: dict[Axis, Tensor] = {}
    start, inner = 0, axis.size
    for part in axis.parts:
        size = find(part).size
        inner //= size if axis.kind == "product" else 1
        for leaf, own in places(part).items():
            if axis.kind == "product":
                own = own.repeat_interleave(inner).repeat(axis.size // (inner * size))
                if leaf in found:
                    leaf.pinned = True
            else:
                whole = torch.full((axis.size,), -1)
                whole[start : start + size] = own
                own = whole
            found[leaf] = torch.maximum(found[leaf], own) if leaf in found else own
        start += size
    return found
