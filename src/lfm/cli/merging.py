"""`lfm merge`: mergekit's recipes, unchanged."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lfm.cli import orders, work
from lfm.core.errors import ConfigError

Recipe = Annotated[Path, typer.Argument(help="mergekit's YAML.", metavar="RECIPE")]
Place = Annotated[Path, typer.Argument(help="The directory to make; must not exist.", metavar="OUT")]
Vary = Annotated[
    list[str] | None, typer.Option(help="Search for what stands as ${NAME} in the recipe.", metavar="NAME=LOW,HIGH")
]
Dev = Annotated[str, typer.Option(help="Records that a search is led by.", metavar="FILE")]
Valid = Annotated[str, typer.Option(help="Others to measure its result on.", show_default="half of --dev")]
Tries = Annotated[int | None, typer.Option(min=2, help="Candidates of a search.", show_default="200")]
Plan = Annotated[bool, typer.Option("--plan", help="Say what it would take, and do nothing.")]


def merge(
    recipe: Recipe,
    out: Place,
    seed: work.Seed = None,
    evals: work.Evals = None,
    allow_nonfinite: work.Nonfinite = False,
    memory: work.Memory = "",
    shard: work.Shard = "",
    vary: Vary = None,
    dev: Dev = "",
    valid: Valid = "",
    tries: Tries = None,
    plan: Plan = False,
    json: work.Json = False,
) -> None:
    """Merge models as a mergekit recipe says. The result appears whole and verified, or not at all."""
    from lfm.merging.recipe import filled, names, parse, references
    from lfm.runs import Order, command

    work.cut(shard)
    try:
        text = recipe.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{recipe} cannot be read", why=getattr(error, "strerror", "") or "it is not text") from None
    found, _ = parse(filled(text, dict.fromkeys(names(text), 0.0)))
    id, settings, data = _asked(text, vary or (), dev, valid, tries)
    limits: dict[str, Any] = {"allow_nonfinite": allow_nonfinite, "memory": orders.size(memory)}
    options = [*(["--seed", str(seed)] if seed else []), *command.limits(**limits)]
    options += [f"--vary={each}" for each in vary or ()] + [f"--{role}={file}" for role, file in data.items()]
    options += [f"--tries={tries}"] if tries else []
    options += [f"--eval={each}" for each in evals or ()] + ([f"--max-shard-size={shard}"] if shard else [])
    order = Order(
        id=id,
        models={"models": references(found)},
        data=data,
        settings=settings,
        out=out,
        seed=seed or 0,
        evals=tuple(evals or ()),
        title=f"{found.merge_method} by {recipe.name}",
        command=shlex.join(["lfm", "merge", str(recipe), str(out), *options]),
        **limits,
    )
    if plan:
        work.show_plan(order, json)
    else:
        work.do(order, json)


def _asked(
    text: str, vary: Sequence[str], dev: str, valid: str, tries: int | None
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """The method, its settings and data: the merge itself, or a search over what varies."""
    if not vary:
        if given := [name for name, value in (("--dev", dev), ("--valid", valid), ("--tries", tries)) if value]:
            raise ConfigError(f"{given[0]} is for a search", fix="add --vary NAME=LOW,HIGH, or leave it out")
        return "reuse.merge", {"recipe": text}, {}
    space = {}
    for name, limits in orders.pairs(vary, "--vary NAME=LOW,HIGH"):
        try:
            low, high = map(float, limits.split(","))
        except ValueError:
            raise ConfigError(f"--vary {name}={limits} has no two numbers", fix="write NAME=LOW,HIGH") from None
        space[f"values.{name}"] = [low, high]
    if not dev:
        raise ConfigError("a search needs records to be led by", fix="add --dev FILE")
    settings: dict[str, Any] = {"method": "reuse.merge", "settings": {"recipe": text}, "space": space}
    if tries:
        settings["budget"] = tries
    return "reuse.evolve", settings, {"dev": dev} | ({"valid": valid} if valid else {})


def register(app: typer.Typer) -> None:
    app.command("merge", rich_help_panel="Make")(merge)
