"""JSON Schema of recipes, made from the methods' slots and settings, for editors that complete and check YAML."""

from __future__ import annotations

import json
from typing import Any

from lfm.core import config as configs
from lfm.core import registry
from lfm.core.registry import Listed
from lfm.recipe.parse import ID

TITLE = "Learn From Model recipe"

ONE_OR_MORE = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
"""A reference or several."""

LATER = {"type": "string", "pattern": r"\$\{[^{}]+\}"}
"""A value that a parameter or an earlier step gives."""


def schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of a recipe file with the methods that are installed here."""
    listed = [registry.get(id) for id in registry.ids()]
    definitions: dict[str, Any] = {}
    cases = [_case(method, definitions) for method in listed]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": TITLE,
        "type": "object",
        "required": ["name", "steps"],
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string", "description": "what the recipe makes, as the report's title"},
            "about": {"type": "string", "description": "one paragraph for the report"},
            "seed": {"type": "integer", "default": 0},
            "params": {"type": "object", "description": "values that ${params.name} stands for; --set params.name=…"},
            "steps": {"type": "array", "minItems": 1, "items": _step(listed, cases)},
        },
        **({"$defs": definitions} if definitions else {}),
    }


def _step(listed: list[Listed], cases: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["id", "method"],
        "additionalProperties": False,
        "properties": {
            "id": {"type": "string", "pattern": f"^{ID.pattern}$", "description": "other steps say ${id}"},
            "method": {"enum": [method.id for method in listed]},
            "about": {"type": "string", "description": "one sentence for the report"},
            "models": {"type": "object", "additionalProperties": ONE_OR_MORE},
            "data": {"type": "object", "additionalProperties": {"type": "string"}},
            "set": {"type": "object"},
            "matrix": {"type": "object", "additionalProperties": {"type": "array", "minItems": 1}},
            "eval": {**ONE_OR_MORE, "description": "data to hold the models against before and after"},
            "format": {"type": "string", "description": "how the output is saved, where a model has several formats"},
            "allow_nonfinite": {"type": "boolean", "description": "let NaN and infinities in weights through a merge"},
            "seed": {"anyOf": [{"type": "integer"}, LATER]},
        },
        "allOf": cases,
    }


def _case(method: Listed, definitions: dict[str, Any]) -> dict[str, Any]:
    """What a step of this method may hold."""
    prefix = f"{method.id}."
    own = configs.schema(method.method.config)
    own = json.loads(json.dumps(own).replace("#/$defs/", f"#/$defs/{prefix}"))
    definitions |= {prefix + name: body for name, body in own.pop("$defs", {}).items()}
    settings = {
        name: {"anyOf": [body, LATER], **{key: body[key] for key in ("description", "default") if key in body}}
        for name, body in own["properties"].items()
    }
    models = {
        role: {**ONE_OR_MORE, **({"description": slot.help} if slot.help else {})}
        for role, slot in method.method.models.items()
    }
    data = {
        role: {"type": "string", **({"description": slot.help} if slot.help else {})}
        for role, slot in method.method.data.items()
    }
    closed = {"type": "object", "additionalProperties": False}
    varied = [*settings, *(f"models.{role}" for role in models), *(f"data.{role}" for role in data)]
    return {
        "if": {"properties": {"method": {"const": method.id}}, "required": ["method"]},
        "then": {
            "description": method.summary,
            "properties": {
                "set": {**closed, "properties": settings},
                "models": {**closed, "properties": models},
                "data": {**closed, "properties": data},
                "matrix": {"type": "object", "propertyNames": {"enum": varied}},
            },
        },
    }
