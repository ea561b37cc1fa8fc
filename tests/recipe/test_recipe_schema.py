"""The JSON Schema of recipes accepts what lfm accepts and refuses what it refuses."""

from __future__ import annotations

import jsonschema
import pytest
import yaml

from lfm.recipe.schema import schema
from recipe.test_recipe_parse import BAD, GOOD

pytestmark = pytest.mark.usefixtures("planted")

UNSEEN = {
    *("an unknown step", "an ambiguous step", "a point that is not there", "an unknown parameter", "broken YAML"),
    *("an unreadable reference", "a field that steps do not have", "an id given twice", "a key given twice"),
    "a setting out of range",  # inside a matrix
}
"""What a schema cannot know: the meaning of references, and that ids differ."""


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


def test_a_good_recipe_is_accepted() -> None:
    jsonschema.validate(yaml.safe_load(GOOD), schema())


@pytest.mark.parametrize("name", sorted(set(BAD) - UNSEEN))
def test_what_lfm_refuses_the_schema_refuses(name: str) -> None:
    old, new, _ = BAD[name]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(GOOD.replace(old, new, 1)), schema())


def test_a_setting_may_come_from_elsewhere() -> None:
    text = GOOD.replace("matrix: {rank: [4, 8]}", 'set: {rank: "${params.rate}"}').replace("    set: {rate", "    #")
    jsonschema.validate(yaml.safe_load(text), schema())
