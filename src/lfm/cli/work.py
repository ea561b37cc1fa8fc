"""`lfm plan` and `lfm run`: what a run would take, and the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lfm.cli import orders, screen
from lfm.cli.progress import shown
from lfm.core import registry
from lfm.core.errors import SlotError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lfm.record import Edited, RunRecord
    from lfm.runs import Order
    from lfm.runs.plan import Plan

DOES_NOT_FIT = 6

Target = Annotated[str, typer.Argument(help="A method (edit.rome), a recipe's file, or a recipe's name.")]
Words = Annotated[
    list[str] | None, typer.Argument(help="What fills the method's roles: model=REF train=FILE …", metavar="ROLE=REF")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting; in a recipe, STEP.KEY=VALUE or params.NAME=VALUE.", metavar="KEY=VALUE"),
]
Out = Annotated[Path | None, typer.Option(help="The directory to make; must not exist.", show_default="runs/NAME")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Of everything random.", show_default="0")]
Evals = Annotated[list[str] | None, typer.Option("--eval", help="Data to measure on before and after.", metavar="FILE")]
Form = Annotated[str, typer.Option("--format", help="How to save, where there are several ways: adapter, checkpoint…")]
Queries = Annotated[int | None, typer.Option("--budget-queries", min=0, help="Requests to endpoints, at most.")]
Tokens = Annotated[int | None, typer.Option("--budget-tokens", min=0, help="Tokens of endpoints, at most.")]
Nonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Let NaN and infinities in weights through merges; else refused.")
]
Memory = Annotated[
    str, typer.Option("--max-memory", help="Use no more, or refuse before starting.", metavar="SIZE", show_default="")
]
Shard = Annotated[
    str, typer.Option("--max-shard-size", help="Of a file of weights.", metavar="SIZE", show_default="5GB")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Jobs = Annotated[
    int, typer.Option("--jobs", "-j", min=1, help="A recipe's steps that run at once, each in its own process.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else on stdout.")]


def is_method(target: str) -> bool:
    """Whether the target is meant as a method's id: one that exists, or at least looks like one and is no recipe."""
    from lfm.recipe.parse import shipped

    if target in registry.ids():
        return True
    return not target.endswith((".yaml", ".yml")) and not Path(target).is_file() and target not in shipped()


def plan(
    target: Target,
    words: Words = None,
    sets: Sets = None,
    out: Out = None,
    seed: Seed = None,
    evals: Evals = None,
    form: Form = "",
    queries: Queries = None,
    tokens: Tokens = None,
    allow_nonfinite: Nonfinite = False,
    memory: Memory = "",
    device: Device = "auto",
    jobs: Jobs = 1,
    json: Json = False,
) -> None:
    """What would a run take? Access, time, memory, disk, queries and tokens; nothing is run and no weight read."""
    _use(device)
    if not is_method(target):
        from lfm.cli import recipes

        _for_a_method(target, words, evals, form, queries, tokens, allow_nonfinite, memory)
        return recipes.plan(target, orders.settings(sets or ()), out, seed, json)
    show_plan(_order(target, words, sets, out, seed, evals, form, queries, tokens, allow_nonfinite, memory), json)


def show_plan(order: Order, json: bool) -> None:
    """What an order would take, on the screen; exit code 6 if it does not fit."""
    from lfm import runs

    with shown(quiet=json) as show:
        found = runs.plan(runs.prepare(order, show))
    if json:
        screen.emit(plan_facts(found))
    else:
        _show_plan(found)
    if not found.fits:
        raise typer.Exit(DOES_NOT_FIT)


def run(
    target: Target,
    words: Words = None,
    sets: Sets = None,
    out: Out = None,
    seed: Seed = None,
    evals: Evals = None,
    form: Form = "",
    queries: Queries = None,
    tokens: Tokens = None,
    allow_nonfinite: Nonfinite = False,
    memory: Memory = "",
    shard: Shard = "",
    device: Device = "auto",
    jobs: Jobs = 1,
    json: Json = False,
) -> None:
    """Run a method, or a recipe. The result appears whole and verified, or not at all; a killed run resumes."""
    _use(device)
    cut(shard)
    if not is_method(target):
        from lfm.cli import recipes
        from lfm.runs import together

        together.alone("a recipe")
        _for_a_method(target, words, evals, form, queries, tokens, allow_nonfinite, memory)
        recipes.run(target, orders.settings(sets or ()), out, seed, jobs, json)
        return
    do(_order(target, words, sets, out, seed, evals, form, queries, tokens, allow_nonfinite, memory), json)


def do(order: Order, json: bool) -> None:
    """Carry an order out, with progress, and show what came of it."""
    from lfm import report, runs

    def page(made: Path) -> None:
        report.write(made, name=order.out.name)

    if int(os.environ.get("RANK", "0")):  # one of several processes, and not the one that speaks
        runs.execute(order)
        return
    try:
        with shown(quiet=json) as show:
            done = runs.execute(order, show=show, report=page)
    except KeyboardInterrupt:
        screen.err().print(
            f"\n[bold]stopped.[/] What was done is kept; the same command goes on from there:\n  {order.command}",
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    if json:
        import msgspec

        screen.emit(msgspec.to_builtins(done) | {"out": str(order.out)})
    else:
        _show_done(done, order.out)


def _for_a_method(target: str, *given: Any) -> None:
    """A recipe's steps say these for themselves."""
    if any(each for each in given):
        raise SlotError(
            f"{target} is a recipe: its steps name their own roles, data, formats and budgets",
            fix="change one with --set STEP.KEY=VALUE or --set params.NAME=VALUE, or edit a copy of the file",
        )


def cut(shard: str) -> None:
    """Have files of weights no larger than this."""
    if bytes_ := orders.size(shard):
        from lfm.tensors.write import SHARD

        os.environ[SHARD] = str(bytes_)


def _use(device: str) -> None:
    if device != "auto":
        os.environ["LFM_DEVICE"] = device


def _order(
    target: str,
    words: Any,
    sets: Any,
    out: Any,
    seed: Any,
    evals: Any,
    form: str,
    queries: Any,
    tokens: Any,
    allow_nonfinite: bool,
    memory: str,
) -> Order:
    return orders.order(
        target,
        words or (),
        sets=sets or (),
        out=out,
        seed=seed or 0,
        evals=evals or (),
        form=form,
        queries=queries,
        tokens=tokens,
        allow_nonfinite=allow_nonfinite,
        memory=memory,
    )


def plan_facts(found: Plan) -> dict[str, Any]:
    """A plan as scripts read it."""
    import msgspec

    return msgspec.to_builtins(found) | {"fits": found.fits}


def _show_plan(found: Plan) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    for role, names in found.access.items():
        grid.add_row(role, screen.badges(names, screen.ACCESS))
    low, high = found.seconds
    grid.add_row("time", Text(f"{screen.duration(low)} to {screen.duration(high)} on {found.device}"))
    grid.add_row("memory", Text(screen.size(found.memory)))
    grid.add_row("disk", Text(screen.size(found.disk)))
    if found.queries:
        grid.add_row("queries", Text(f"{found.queries}, about {screen.count(found.tokens)} tokens"))
    if found.here:
        grid.add_row("questions", Text(f"{found.here:,} to models here, of no budget"))
    console = screen.out()
    console.print(f"\n  [bold cyan]{found.method}[/]")
    console.print(Padding(grid, (1, 0, 1, 2)))
    if found.fits:
        console.print("  [green]✓[/] it fits on this machine\n")
    for lack in found.lacks:
        console.print(f"  [red]✗ would not fit:[/] {lack}", soft_wrap=True)
    if found.lacks:
        console.print()


def _show_done(done: RunRecord, out: Path) -> None:
    from rich.padding import Padding
    from rich.text import Text

    console = screen.out()
    console.print(Text.assemble("\n  ", (done.id, "bold cyan"), "  → ", (str(out), "bold")), soft_wrap=True)
    for evaluation, after in done.after.items():
        console.print(Padding(screen.measures(done.before.get(evaluation, {}), after, evaluation), (1, 0, 0, 2)))
    from lfm.core import finding

    if (out / finding.FILE).exists():
        console.print(Padding(screen.finding(finding.read(out)), (1, 0, 0, 2)))
    if done.edited:
        console.print(Padding(_edited(done.edited), (1, 0, 0, 2)))
    console.print(Text.assemble("\n  ", ("✓ ", "green"), str(done.verified)), soft_wrap=True)
    tokens = f", {done.tokens:,} tokens" if done.tokens else ""
    asked = f"; {done.queries:,} queries{tokens}" if done.queries else ""
    console.print(f"  [dim]{screen.duration(done.seconds)}{asked}; digest {done.output.digest[:12]}[/]")
    console.print(f"\n  [dim]the page[/]  {out / 'report.html'}\n", soft_wrap=True)


def _edited(edited: Edited) -> RenderableType:
    """The edits' own prompts before and after, and how much else moved; the page shows the rest."""
    from rich.console import Group

    from lfm.report.edited import beside, line

    own = [line(told.answers[0]) for told in edited.told if told.answers]
    more = edited.edits - len(own)
    said = [f"and {more} more" if more > 0 else "", beside(edited)]
    return Group(screen.sides(own), *(text for text in said if text))


def register(app: typer.Typer) -> None:
    panel = "Make"
    app.command("plan", rich_help_panel=panel)(plan)
    app.command("run", rich_help_panel=panel)(run)
