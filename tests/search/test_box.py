"""lfm.search.box: settings as points, within their limits, from the defaults on."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lfm.core
from lfm.core import Meta
from lfm.core.errors import ConfigError
from lfm.search import box


class Config(lfm.core.Config, frozen=True):
    scale: Annotated[float, Meta(ge=0, le=1)] = 0.4
    rank: Annotated[int, Meta(ge=1)] = 3
    weights: tuple[Annotated[float, Meta(ge=0)], ...] = ()
    share: Annotated[float, Meta(gt=0)] | None = None
    scope: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()


SPACE = {"scale": (0.0, 1.0), "rank": (1, 8), "weights": (0.0, 2.0), "share": (0.2, 0.6)}


def test_zero_is_the_defaults_and_a_side_is_one_long() -> None:
    made = box(Config, SPACE, {"scope": "b"}, 2)
    assert made.dim == 5
    assert made.at(np.zeros(5)) == [{"scope": "b", "scale": 0.4, "rank": 3, "weights": [1.0, 1.0], "share": 0.4}]
    (moved,) = made.at(np.array([0.1, 1 / 7, -0.25, 0.5, 1.0]))
    assert moved["scale"] == pytest.approx(0.5)
    assert moved["rank"] == 4 and isinstance(moved["rank"], int)
    assert moved["weights"] == pytest.approx([0.5, 2.0])
    assert moved["share"] == pytest.approx(0.4)  # half a side up to the wall, and half a side back


@given(st.lists(st.floats(-5, 5), min_size=5, max_size=5))
def test_every_point_is_within_the_limits(point: list[float]) -> None:
    (settings,) = box(Config, SPACE, {}, 2).at(np.array(point))
    for name, (low, high) in SPACE.items():
        numbers = settings[name] if isinstance(settings[name], list) else [settings[name]]
        assert all(low <= number <= high for number in numbers)


def test_copies_have_settings_of_their_own() -> None:
    made = box(Config, {"scale": (0.0, 1.0)}, {}, 2, copies=3)
    assert made.dim == 3
    assert [s["scale"] for s in made.at(np.array([0.0, 0.1, -0.1]))] == pytest.approx([0.4, 0.5, 0.3])


def test_corners_are_all_lows_and_all_highs() -> None:
    assert box(Config, {"rank": (1, 8), "weights": (0.5, 2)}, {"scale": 1.0}, 2).corners() == [
        {"scale": 1.0, "rank": 1, "weights": [0.5, 0.5]},
        {"scale": 1.0, "rank": 8, "weights": [2.0, 2.0]},
    ]


@pytest.mark.parametrize(
    ("space", "fixed", "says"),
    [
        ({}, {}, "space is empty"),
        ({"skale": (0, 1)}, {}, "unknown setting 'skale'"),
        ({"scope": (0, 1)}, {}, "'scope' is no number"),
        ({"names": (0, 1)}, {}, "'names' is no number"),
        ({"scale": (1, 1)}, {}, "limits 1 and 1"),
        ({"scale": (0, 1)}, {"scale": 0.5}, "both searched and fixed"),
        ({"scale": (0, 1)}, {"rank": 0}, "rank"),
        ({"rank": (1.2, 1.8)}, {}, "no whole number lies between 1.2 and 1.8"),
    ],
)
def test_what_cannot_be_searched(space: dict, fixed: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        box(Config, space, fixed, 2)


@given(st.floats(-3, 3))
def test_whole_numbers_stay_within_limits_that_are_none(step: float) -> None:
    """round(0.5) is 0 and round(3.5) is 4: both lie outside."""
    made = box(Config, {"rank": (0.5, 3.5)}, {}, 1)
    assert made.at(np.array([step]))[0]["rank"] in (1, 2, 3)
    assert [corner["rank"] for corner in made.corners()] == [1, 3]
