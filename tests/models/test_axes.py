"""lfm.models.axes: sums and products of axes, against what reshaping and cutting do to numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.models.axes import (
    Axis,
    UnclearError,
    cut,
    factors,
    find,
    fixed,
    free,
    leaves,
    places,
    product,
    terms,
    total,
    unify,
    viewed,
)

SIZES = st.lists(st.integers(2, 4), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_a_product_lies_on_its_parts_as_a_flattened_tensor_does(sizes: list[int]) -> None:
    parts = free(sizes)
    expected = torch.unravel_index(torch.arange(product(parts).size), sizes)
    found = places(product(parts))
    assert all(torch.equal(found[part], where) for part, where in zip(parts, expected))


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_a_sum_lies_on_one_part_after_the_other(sizes: list[int]) -> None:
    parts = free(sizes)
    found = places(total(parts))
    assert torch.equal(
        torch.cat([found[part][found[part] >= 0] for part in parts]), torch.cat([*map(torch.arange, sizes)])
    )
    assert (torch.stack([found[part] >= 0 for part in parts]).sum(0) == 1).all()


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_split_and_flattened_again_an_axis_is_the_product_of_its_parts(sizes: list[int]) -> None:
    whole = Axis(torch.Size(sizes).numel())
    parts = viewed([whole], sizes)
    assert [part.size for part in parts] == sizes
    (back,) = viewed(parts, [whole.size])
    assert list(map(find, factors(back))) == list(map(find, factors(whole))) == list(map(find, parts))
    assert not any(leaf.pinned for leaf in leaves(whole))


def test_a_view_across_borders_pins_what_it_cannot_tell_apart() -> None:
    axes = free([4, 3])
    made = viewed(axes, [3, 4])
    assert all(leaf.pinned for axis in (*axes, *made) for leaf in leaves(axis))


def test_cut_at_other_places_the_pieces_are_common_to_both() -> None:
    one, other = Axis(10), Axis(10)
    first, second = cut(one, [4, 10]), cut(other, [6, 10])
    unify(one, other)
    assert [leaf.size for leaf in leaves(one)] == [4, 2, 4]
    assert leaves(one) == leaves(other)
    assert leaves(first[1]) == leaves(one)[1:] and leaves(second[0]) == leaves(one)[:2]


def test_what_is_one_with_a_pinned_axis_is_pinned_in_all_its_parts() -> None:
    axis = Axis(12)
    heads, width = viewed([axis], [3, 4])
    unify(axis, fixed([12])[0])
    assert all(leaf.pinned for part in (heads, width) for leaf in leaves(part))


def test_heads_cut_from_one_axis_share_what_is_inside_them() -> None:
    """Four heads' queries and two of keys, in one matrix: 6 × 8 positions, cut at 32."""
    axis = Axis(48)
    viewed([axis], [6, 8])
    queries, keys = cut(axis, [32, 48])
    assert [f.size for f in factors(queries)] == [4, 8] and [f.size for f in factors(keys)] == [2, 8]
    assert factors(queries)[1] is factors(keys)[1] and not any(leaf.pinned for leaf in leaves(axis))


def test_axes_of_other_sizes_are_not_one_and_squares_do_not_move() -> None:
    with pytest.raises(UnclearError):
        unify(Axis(3), Axis(4))
    side = Axis(3)
    places(product([side, side]))
    assert side.pinned


def test_terms_are_the_corners_of_a_tensor_and_too_many_are_none() -> None:
    a, b, c, d = free([2, 3, 4, 5])
    assert terms([total([a, product([b, c])]), d]) == [[a, d], [b, c, d]]
    assert terms([total([a, b])] * 10) == []
