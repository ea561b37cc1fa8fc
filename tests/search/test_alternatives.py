"""Settings made smaller until they fit a budget, and no smaller than they must be."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lfm.core
from lfm.core import Meta
from lfm.search.alternatives import PARTS, largest


class Sized(lfm.core.Config, frozen=True):
    calls: Annotated[int, Meta(ge=1, description="")] = 8000
    rounds: Annotated[int, Meta(ge=2, description="")] = 40
    examples: Annotated[int, Meta(ge=1, description="")] = 64
    width: Annotated[int, Meta(ge=1, description="no size of a search")] = 7


def cost(config: Any) -> int:
    return config.calls * config.rounds + 10 * config.examples


@given(st.integers(0, 400_000))
def test_it_fits_and_hardly_more_would(budget: int) -> None:
    found = largest(Sized(), cost, lambda made: cost(made) <= budget)
    if found is None:
        assert budget < cost(Sized(calls=1, rounds=2, examples=1))
        return
    changed, made = found
    assert cost(made) <= budget and made == Sized(**changed) and made.width == 7
    if changed.keys() >= {"calls", "rounds"} and "examples" not in changed and min(changed.values()) > PARTS:
        more = {name: size + size // (PARTS // 2) + 1 for name, size in changed.items()}
        assert cost(Sized(**more)) > budget


def test_what_fits_whole_is_left_as_it_is() -> None:
    assert largest(Sized(), cost, lambda made: True) == ({}, Sized())


@pytest.mark.parametrize(
    ("budget", "calls"), [(8000, 8000), (7999, 7875), (6000, 6000), (1999, 1968), (1, 1), (0, None)]
)
def test_one_size_uses_the_budget_to_a_part_of_its_half(budget: int, calls: int | None) -> None:
    """Between half and whole in 32 parts: 7875 = 4000 + 4000 · 31/32."""
    found = largest(Sized(), lambda made: made.calls, lambda made: made.calls <= budget)
    assert (found and found[1].calls) == calls


def test_examples_are_the_last_to_go() -> None:
    found = largest(Sized(), cost, lambda made: cost(made) <= 10 * 64 + 2)
    assert found is not None and found[1] == Sized(calls=1, rounds=2, examples=64)
    found = largest(Sized(), cost, lambda made: cost(made) <= 100)
    assert found is not None and found[1] == Sized(calls=1, rounds=2, examples=9)
