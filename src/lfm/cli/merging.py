"""`lfm merge`: mergekit's recipes, unchanged."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from lfm.cli import orders, work
from lfm.core.errors import ConfigError

Recipe = Annotated[Path, typer.Argument(help="mergekit's YAML.", metavar="RECIPE")]
Place = Annotated[Path, typer.Argument(help="The directory to make; must not exist.", metavar="OUT")]
Plan = Annotated[bool, typer.Option("--plan", help="Say what it would take, and do nothing.")]


def merge(
    recipe: Recipe,
    out: Place,
    seed: work.Seed = None,
    evals: work.Evals = None,
    allow_nonfinite: work.Nonfinite = False,
    memory: work.Memory = "",
    plan: Plan = False,
    json: work.Json = False,
) -> None:
    """Merge models as a mergekit recipe says. The result appears whole and verified, or not at all."""
    from lfm.merging.recipe import parse, references
    from lfm.runs import Order, command

    try:
        text = recipe.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{recipe} cannot be read", why=getattr(error, "strerror", "") or "it is not text") from None
    found, _ = parse(text)
    limits: dict[str, Any] = {"allow_nonfinite": allow_nonfinite, "memory": orders.size(memory)}
    options = [*(["--seed", str(seed)] if seed else []), *command.limits(**limits)]
    order = Order(
        id="reuse.merge",
        models={"models": references(found)},
        settings={"recipe": text},
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


def register(app: typer.Typer) -> None:
    app.command("merge", rich_help_panel="Make")(merge)
