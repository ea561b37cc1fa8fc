"""mergekit's YAML, unchanged: read, checked, and told in what ways it cannot be followed.

Source: mergekit 0.1.5, its README and docs/merge_methods.md (https://github.com/arcee-ai/mergekit).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

import msgspec

from lfm.core.errors import ConfigError

Setting = Any
"""A number, a word, a list of them (a gradient over the layers), or a list of {filter, value}."""

Parameters = dict[str, Setting]


class Source(msgspec.Struct, frozen=True):
    """One model that goes into a slice: its layers from the first to before the second number."""

    model: str
    layer_range: tuple[int, int] | None = None
    parameters: Parameters = {}


class Slice(msgspec.Struct, frozen=True):
    """Layers of the result, and what they are made of."""

    sources: tuple[Source, ...]
    base_model: str | None = None
    residual_weight: float | None = None
    parameters: Parameters = {}


class Module(msgspec.Struct, frozen=True):
    """A part of the model: by slices, or by whole models."""

    slices: tuple[Slice, ...] = ()
    models: tuple[Source, ...] = ()
    parameters: Parameters = {}


class FromModel(msgspec.Struct, frozen=True, tag="model_token", tag_field="kind"):
    """A token's row is that of a token of this model."""

    model: str
    token: str | None = None
    token_id: int | None = None


class Zero(msgspec.Struct, frozen=True, tag="zero", tag_field="kind"):
    """A token's row is 0."""


class Token(msgspec.Struct, frozen=True):
    """Where a token's row comes from in models that lack it; in all models where forced."""

    source: FromModel | Zero | str | None = None
    force: bool = False


class Tokenizer(msgspec.Struct, frozen=True):
    """The result's tokenizer: "union", "base" or a model's."""

    source: str = "union"
    tokens: dict[str, Token] = {}
    pad_to_multiple_of: int | None = None


class Recipe(msgspec.Struct, frozen=True):
    """A whole merge. Just one of models, slices and modules is given."""

    merge_method: str
    models: tuple[Source, ...] = ()
    slices: tuple[Slice, ...] = ()
    modules: dict[str, Module] = {}
    base_model: str | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    parameters: Parameters = {}

    @property
    def wants_tokenizer(self) -> Tokenizer | None:
        """The tokenizer asked for, in either way of asking."""
        return self.tokenizer or (Tokenizer(source=self.tokenizer_source) if self.tokenizer_source else None)


DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names of a recipe's dtypes, and the format's."""


NAME = re.compile(r"\$\{(\w+)\}")


def names(text: str) -> list[str]:
    """What stands in a recipe's text as ${NAME}, in its order."""
    return list(dict.fromkeys(NAME.findall(text)))


def filled(text: str, values: Mapping[str, float]) -> str:
    """A recipe's text with numbers in place of its ${NAME}s. ConfigError unless just those are given that it has."""
    asked = dict.fromkeys(names(text))
    if asked.keys() != values.keys():
        odd = sorted(asked.keys() ^ values.keys())
        raise ConfigError(
            f"the recipe has {', '.join(f'${{{name}}}' for name in asked) or 'no ${NAME}'}, "
            f"values were given for {', '.join(values) or 'none'}",
            why=f"they differ in {', '.join(odd)}",
            fix="`lfm merge RECIPE OUT --vary NAME=LOW,HIGH --dev FILE` searches for them",
        )
    return NAME.sub(lambda match: repr(float(values[match[1]])), text)


def parse(text: str) -> tuple[Recipe, tuple[str, ...]]:
    """A recipe, and what in it has no meaning to anyone. ConfigError naming the place of what cannot be followed."""
    import yaml

    try:
        whole = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError("the recipe is not YAML", why=f"{where}: {getattr(error, 'problem', '') or error}") from None
    if not isinstance(whole, dict):
        raise ConfigError("the recipe is not a mapping", fix="it begins with merge_method: and models: or slices:")
    if "merge_method" not in whole:
        moe = "; this is one of mergekit-moe, which lfm does not follow" if "experts" in whole else ""
        raise ConfigError("the recipe has no merge_method", why=f"it says what is done with the models{moe}")
    if isinstance(whole.get("tokenizer"), str):
        raise ConfigError(
            f"the recipe's tokenizer is {whole['tokenizer']!r}", fix="write tokenizer_source: for a name alone"
        )
    unknown: list[str] = []
    try:
        found = msgspec.convert(_plain(whole, Recipe, "", unknown), Recipe, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"the recipe cannot be read: {error}", fix="docs/merge.md shows what a recipe holds"
        ) from None
    _check(found)
    return found, tuple(unknown)


def references(recipe: Recipe) -> tuple[str, ...]:
    """Every model that a recipe names, the base first, then as they come."""
    named = [recipe.base_model, *(s.model for s in recipe.models)]
    for part in _slices(recipe):
        named += [part.base_model, *(s.model for s in part.sources)]
    for module in recipe.modules.values():
        named += [s.model for s in module.models]
    wanted = recipe.wants_tokenizer
    if wanted:
        named += [wanted.source if wanted.source not in ("union", "base") else None]
        for token in wanted.tokens.values():
            source = token.source
            named.append(source.model if isinstance(source, FromModel) else source if isinstance(source, str) else None)
    return tuple(dict.fromkeys(name for name in named if name))


def _slices(recipe: Recipe) -> Iterator[Slice]:
    yield from recipe.slices
    for module in recipe.modules.values():
        yield from module.slices


def _check(recipe: Recipe) -> None:
    given = [kind for kind in ("models", "slices", "modules") if getattr(recipe, kind)]
    if len(given) != 1:
        raise ConfigError(
            f"the recipe has {' and '.join(given) or 'neither models nor slices nor modules'}", fix="give just one"
        )
    for name, module in recipe.modules.items():
        if bool(module.slices) == bool(module.models):
            raise ConfigError(f"module {name!r} needs either slices or models")
    for part in _slices(recipe):
        for source in part.sources:
            if source.layer_range is None or not 0 <= source.layer_range[0] < source.layer_range[1]:
                raise ConfigError(
                    f"a slice of {source.model} has layer_range {list(source.layer_range or ())}",
                    fix="write [first, end]: layers from first to before end, counted from 0",
                )
        lengths = {end - begin for begin, end in (s.layer_range for s in part.sources if s.layer_range)}
        if len(lengths) > 1:
            raise ConfigError(f"the sources of a slice have {_either(sorted(lengths))} layers", fix="give all as many")
        if not part.sources:
            raise ConfigError("a slice has no sources")
    for kind in ("dtype", "out_dtype"):
        value = getattr(recipe, kind)
        if value and value.removeprefix("torch.") not in DTYPES:
            raise ConfigError(f"the recipe's {kind} is {value!r}", fix=f"known: {', '.join(DTYPES)}")
    if recipe.tokenizer and recipe.tokenizer_source:
        raise ConfigError("the recipe has both tokenizer_source and tokenizer", fix="give one")
    wanted = recipe.wants_tokenizer
    if wanted and wanted.pad_to_multiple_of is not None and wanted.pad_to_multiple_of < 1:
        raise ConfigError(f"pad_to_multiple_of is {wanted.pad_to_multiple_of}", fix="give a whole number above 0")


def code_of(dtype: str | None) -> str | None:
    """The format's code of a dtype's name."""
    return DTYPES[dtype.removeprefix("torch.")] if dtype else None


def _either(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"


CHILDREN: Mapping[type, Mapping[str, tuple[Literal["one", "many", "named"], type]]] = {
    Recipe: {
        "models": ("many", Source),
        "slices": ("many", Slice),
        "modules": ("named", Module),
        "tokenizer": ("one", Tokenizer),
    },
    Slice: {"sources": ("many", Source)},
    Module: {"slices": ("many", Slice), "models": ("many", Source)},
    Tokenizer: {"tokens": ("named", Token)},
    Token: {},
    Source: {},
}
REFERENCES = ("model", "base_model", "tokenizer_source", "source")


def _plain(value: Any, kind: type, where: str, unknown: list[str]) -> Any:
    """A mapping of the YAML as msgspec takes it: nulls left out, models by their text, keys that mean nothing noted."""
    if not isinstance(value, dict):
        return value
    known = [field.name for field in msgspec.structs.fields(kind)]
    found: dict[str, Any] = {}
    for key, inner in value.items():
        place = f"{where}{key}"
        if key not in known:
            near = get_close_matches(str(key), known, n=1, cutoff=0.75)
            if near:
                raise ConfigError(f"the recipe has {place!r}", fix=f"did you mean {near[0]!r}?")
            unknown.append(place)
            continue
        if inner is None:
            continue
        shape, child = CHILDREN[kind].get(key, ("", object))
        if shape == "many" and isinstance(inner, list):
            inner = [_plain(each, child, f"{place}[{i}].", unknown) for i, each in enumerate(inner)]
        elif shape == "named" and isinstance(inner, dict):
            inner = {str(name): _plain(each, child, f"{place}.{name}.", unknown) for name, each in inner.items()}
        elif shape == "one":
            inner = _plain(inner, child, f"{place}.", unknown)
        elif key in REFERENCES:
            inner = _reference(inner)
        found[key] = inner
    return found


def _reference(value: Any) -> Any:
    """A model as text: PATH, PATH@REVISION, PATH+ADAPTER; mergekit's long form is written as the short one."""
    if isinstance(value, dict) and "kind" in value:
        return {**value, **({"model": _reference(value["model"])} if "model" in value else {})}
    if isinstance(value, dict) and "path" in value:
        return f"{value['path']}@{value['revision']}" if value.get("revision") else str(value["path"])
    if isinstance(value, dict) and "model" in value:
        model, adapter = _reference(value["model"]), value.get("lora")
        return f"{model}+{_reference(adapter)}" if adapter else model
    return value
