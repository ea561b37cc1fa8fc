"""What a recipe says of one tensor: gradients, filters, and whose word counts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.core.errors import ConfigError
from lfm.merging.settings import LANGUAGE, Place, resolve


def t_of(setting: Any, at: float, name: str = "w") -> float:
    return resolve("slerp", Place(name, (name, name), at, 0, ({}, {}), ({"t": setting},)))["t"]


def test_a_gradient_is_linear_between_its_numbers() -> None:
    assert [t_of([0, 1], at) for at in (0.0, 0.25, 1.0)] == [0.0, 0.25, 1.0]
    assert [t_of([0, 0.5, 0.2], at) for at in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0, 0.25, 0.5, pytest.approx(0.35), 0.2]
    assert t_of([0.3], 0.7) == 0.3 and t_of("1e-1", 0.5) == 0.1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0, 1))
def test_a_gradient_stays_within_its_numbers(values: list[float], at: float) -> None:
    assert min(values) - 1e-12 <= t_of(values, at) <= max(values) + 1e-12


def test_the_first_filter_that_is_part_of_the_name_counts() -> None:
    setting = [{"filter": "mlp", "value": 0.1}, {"filter": "down", "value": 0.2}, {"value": [0.3, 0.5]}]
    assert [t_of(setting, 0.5, name) for name in ("mlp.down", "x.down", "x")] == [0.1, 0.2, 0.4]
    assert t_of({"filter": "*", "value": 0.7}, 0.5) == 0.7
    with pytest.raises(ConfigError, match="gives no t for x"):
        t_of([{"filter": "mlp", "value": 1}], 0.5, "x")


def test_the_nearest_word_counts() -> None:
    wide = ({"weight": 3.0}, {"weight": 4.0, "normalize": False})
    place = Place("w", ("w", "w"), 0.0, None, (({"weight": 1.0}, *wide), ({}, *wide)), wide)
    assert resolve("linear", place) == {"weights": (1.0, 3.0), "normalize": False}


def test_parameters_of_each_model_leave_out_the_base() -> None:
    scopes = tuple(({"weight": float(i)},) for i in range(3))
    told = resolve("ties", Place("w", ("w",) * 3, 0.0, 1, scopes, ({},)))
    assert told["weights"] == (0.0, 2.0) and told["density"] == (1.0, 1.0)


@pytest.mark.parametrize("method", LANGUAGE)
def test_every_method_is_one_of_ours_that_takes_these_settings(method: str) -> None:
    from lfm.core import registry
    from lfm.core.config import configure

    spoken = LANGUAGE[method].parameters
    every = {name: 1 if p.kind is int else 0.1 for name, p in spoken.items() if p.kind is not bool}
    told = resolve(method, Place("w", ("w",) * 3, 0.0, 0, ((every,),) * 3, (every,)))
    ours = registry.get(f"reuse.{method}").method
    assert ours.merge is not None and configure(ours.config, told)
