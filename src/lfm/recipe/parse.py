"""A recipe's text → a Recipe, or an error that names the file and the line."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, final

import msgspec

from lfm.core.errors import LfmError, RecipeError, at

MAX_NODES = 100_000
"""A recipe larger than this after its aliases are expanded is refused."""

MAX_DEPTH = 40
"""Deeper nesting is refused: an alias that holds itself has no end."""

Trail = tuple[Hashable, ...]
"""Keys and indices from the root of the document to a value."""

ID = re.compile(r"[a-z][a-z0-9_-]*")


@final
class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run, or one a point of its matrix. models and data: role → references; set: the method's settings."""

    id: str
    method: str
    about: str = ""
    models: dict[str, str | list[str]] = {}
    data: dict[str, str] = {}
    set: dict[str, Any] = {}
    matrix: dict[str, list[Any]] = {}
    eval: str | list[str] = []
    format: str = ""
    allow_nonfinite: bool = False
    seed: int | str | None = None


@final
class Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recipe as it is written. params: values that `${params.name}` stands for."""

    name: str
    steps: list[Step]
    about: str = ""
    seed: int = 0
    params: dict[str, Any] = {}


@final
class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """A document and the line of each of its values."""

    path: str
    document: Document
    lines: dict[Trail, int]

    def error(self, trail: Trail, what: str, *, why: str = "", fix: str = "") -> RecipeError:
        """A RecipeError at the line of a value, or of the nearest value around it."""
        return RecipeError(f"{at(self.path, line_of(self.lines, trail))}: {what}", why=why, fix=fix)

    def wrap(self, trail: Trail, error: LfmError) -> RecipeError:
        """Another part's error, at the line that caused it."""
        return self.error(trail, error.what, why=error.why, fix=error.fix)


def read(path: str | Path) -> Recipe:
    """The recipe in a file, or one that ships with lfm by its name. RecipeError with file:line if malformed."""
    file = find(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read", why=str(error)) from None
    return parse(text, str(path))


def shipped() -> dict[str, Path]:
    """The recipes that come with lfm, by name."""
    package = Path(__file__).parent.parent
    for folder in (package / "recipes", package.parent.parent / "recipes"):
        if folder.is_dir():
            return {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    return {}


def find(path: str | Path) -> Path:
    """The file of a recipe named by path or by name."""
    file, known = Path(path), shipped()
    if file.is_file():
        return file
    if str(path) in known:
        return known[str(path)]
    near = get_close_matches(str(path), known, n=1)
    raise RecipeError(
        f"no recipe {str(path)!r}",
        why="it is neither a file nor a recipe that comes with lfm",
        fix=f"did you mean {near[0]!r}?" if near else f"recipes that come with lfm: {', '.join(known) or 'none'}",
    )


def parse(text: str, path: str = "recipe.yaml") -> Recipe:
    """A recipe from text. Shape and names of keys are checked here, meaning in lfm.recipe.expand."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(
            f"{at(path, mark.line + 1 if mark else None)}: not YAML", why=error.problem or str(error)
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML", why=str(error)) from None
    if root is None:
        raise RecipeError(f"{path}: empty", fix="a recipe has a name and steps; docs/recipes.md shows one")
    lines: dict[Trail, int] = {}
    plain = _plain(root, (), lines, path)
    if isinstance(plain, dict) and "merge_method" in plain:
        raise RecipeError(f"{path} is a recipe of mergekit's", fix=f"lfm merge {path} OUT")
    try:
        document = msgspec.convert(plain, Document)
    except msgspec.ValidationError as error:
        raise _shape_error(str(error), lines, path) from None
    recipe = Recipe(path=path, document=document, lines=lines)
    _check_ids(recipe)
    return recipe


def line_of(lines: Mapping[Trail, int], trail: Trail) -> int | None:
    """The line of a value, or of the nearest value around it that has one."""
    while trail not in lines and trail:
        trail = trail[:-1]
    return lines.get(trail)


def _plain(node: Any, trail: Trail, lines: dict[Trail, int], path: str) -> Any:
    """A node as plain values, noting the line of each. Keys are strings, none twice."""
    import yaml

    line = node.start_mark.line + 1
    lines[trail] = line
    if len(lines) > MAX_NODES:
        raise RecipeError(f"{at(path, line)}: larger than {MAX_NODES} values", why="aliases are counted as written out")
    if len(trail) > MAX_DEPTH:
        raise RecipeError(f"{at(path, line)}: nested deeper than {MAX_DEPTH}", why="an alias may hold itself")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*trail, i), lines, path) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(node, path)
    found: dict[str, Any] = {}
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else None
        here = key.start_mark.line + 1
        if not isinstance(name, str) or name == "<<":
            raise RecipeError(f"{at(path, here)}: a key must be a word")
        if name in found:
            raise RecipeError(f"{at(path, here)}: {name!r} is given twice", why=f"first {_where(lines, trail, name)}")
        found[name] = _plain(value, (*trail, name), lines, path)
        lines[(*trail, name)] = here
    return found


def _where(lines: Mapping[Trail, int], trail: Trail, name: str) -> str:
    return f"on line {lines[(*trail, name)]}"


def _scalar(node: Any, path: str) -> Any:
    import yaml

    try:
        value = yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{at(path, node.start_mark.line + 1)}: {node.value!r} cannot be read ({error})") from None
    if isinstance(value, str) and node.style is None and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)  # YAML 1.1 reads 1e-3 as text; nobody who writes it means text
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return node.value  # a date is the text that was written


def _shape_error(text: str, lines: Mapping[Trail, int], path: str) -> RecipeError:
    """msgspec's error as file:line, with the nearest known key."""
    what, _, spot = text.partition(" - at `$")
    trail: Trail = tuple(
        int(index) if index else name for name, index in re.findall(r"\.([\w-]+)|\[(\d+)\]", spot.rstrip("`"))
    )
    unknown = re.search(r"unknown field `([^`]*)`", what)
    if unknown:
        name = unknown[1]
        keys = (Step if "steps" in trail else Document).__struct_fields__
        near = get_close_matches(name, keys, n=1)
        return RecipeError(
            f"{at(path, line_of(lines, (*trail, name)))}: unknown key {name!r}",
            fix=f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(keys)}",
        )
    missing = re.search(r"missing required field `([^`]*)`", what)
    said = f"{missing[1]!r} is missing" if missing else what[:1].lower() + what[1:]
    return RecipeError(f"{at(path, line_of(lines, trail))}: {spoken(trail)}{said}")


def spoken(trail: Trail) -> str:
    """("steps", 0, "set") → "steps[0].set: "."""
    words = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in trail).lstrip(".")
    return f"{words}: " if words else ""


def _check_ids(recipe: Recipe) -> None:
    seen: dict[str, int] = {}
    for i, step in enumerate(recipe.document.steps):
        trail = ("steps", i, "id")
        if not ID.fullmatch(step.id) or step.id == "params":
            raise recipe.error(
                trail,
                f"{step.id!r} cannot be a step's id",
                fix="an id is lower-case letters, digits, - and _, starts with a letter, and is not 'params'",
            )
        if step.id in seen:
            first = line_of(recipe.lines, ("steps", seen[step.id], "id"))
            raise recipe.error(trail, f"step id {step.id!r} is given twice", why=f"first on line {first}")
        seen[step.id] = i
    if not recipe.document.steps:
        raise recipe.error(("steps",), "a recipe needs at least one step")
