"""`lfm distill cache`: a teacher's answers, kept."""

from __future__ import annotations

from typing import Annotated

import typer

from lfm.cli import orders, work

ID = "distill.cache"

Words = Annotated[
    list[str], typer.Argument(help="teacher=REF train=FILE [kept=ANSWERS] [reader=REF]", metavar="ROLE=REF")
]
Likeliest = Annotated[
    int | None, typer.Option("-k", min=1, help="Answers of each place.", show_default="64, or as kept")
]
Plan = Annotated[bool, typer.Option("--plan", help="Say what it would take, and do nothing.")]


def cache(
    words: Words,
    k: Likeliest = None,
    out: work.Out = None,
    seed: work.Seed = None,
    queries: work.Queries = None,
    tokens: work.Tokens = None,
    plan: Plan = False,
    json: work.Json = False,
) -> None:
    """Keep what a teacher tells of records, to train students on it without the teacher. A killed run goes on.

    What it makes is a teacher: `lfm run distill.response teacher=ANSWERS student=REF train=FILE`.
    """
    order = orders.order(
        ID, words, sets=[f"k={k}"] if k else [], out=out, seed=seed or 0, queries=queries, tokens=tokens
    )
    if plan:
        work.show_plan(order, json)
    else:
        work.do(order, json)


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
    group.callback()(_distill)
    group.command("cache")(cache)
    app.add_typer(group, name="distill", rich_help_panel="Make")


def _distill() -> None:
    """Keep a teacher's answers for its students."""
