"""Settings: one definition, from which values, help and schema are made."""

from __future__ import annotations

from typing import Annotated, Literal

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.core.config import Config, Meta, configure, fields, schema, values
from lfm.core.errors import ConfigError


class Settings(Config, frozen=True):
    rank: Annotated[int, Meta(ge=1, description="rank of the update")] = 8
    rate: Annotated[float, Meta(gt=0, le=1, description="learning rate")] = 1e-3
    scope: Literal["model", "tensor"] = "model"
    layers: tuple[Annotated[int, Meta(ge=0)], ...] = ()
    layer: int | None = None
    words: dict[str, str] = {}


def test_types_are_told_in_words() -> None:
    assert {f.name: f.type for f in fields(Settings)} == {
        "rank": "int ≥ 1",
        "rate": "float > 0 ≤ 1",
        "scope": "model or tensor",
        "layers": "list of int ≥ 0",
        "layer": "int or none",
        "words": "map of str to str",
    }


def test_strings_of_a_command_line_become_the_fields_type() -> None:
    made = configure(Settings, {"rank": "4", "rate": "0.5", "layers": [1, 2], "layer": 3})
    assert (made.rank, made.rate, made.layers, made.layer) == (4, 0.5, (1, 2), 3)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"rnak": 1}, "did you mean 'rank'"),
        ({"rank": 0}, "rank"),
        ({"rate": "fast"}, "rate"),
        ({"scope": "planet"}, "scope"),
        ({"layers": [1, -1]}, "layers"),
        ({"colour": 1}, "known settings: rank, rate"),
    ],
)
def test_a_bad_setting_is_named_with_what_would_work(given: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        configure(Settings, given)


@given(st.integers(1, 99), st.floats(1e-6, 1, exclude_min=True), st.lists(st.integers(0, 9), max_size=4))
def test_values_of_a_config_make_the_same_config_and_fit_its_schema(rank: int, rate: float, layers: list[int]) -> None:
    made = configure(Settings, {"rank": rank, "rate": rate, "layers": layers})
    assert configure(Settings, values(made)) == made
    jsonschema.validate({**values(made), "layers": list(layers)}, schema(Settings))
