"""`lfm eval` and `lfm compare`: what a model scores, and how two models differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lfm.cli import screen
from lfm.cli.progress import shown
from lfm.report import words

if TYPE_CHECKING:
    from lfm.runs import Comparison

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else on stdout.")]
Ref = Annotated[str, typer.Argument(help="A model: a directory, zoo:NAME, api:URL, serve:REF.", metavar="REF")]


def eval_(
    ref: Ref,
    data: Annotated[list[str], typer.Option(help="Records to measure on; may be given several times.", metavar="FILE")],
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    samples: Annotated[int, typer.Option(help="Answers to show.")] = 5,
    json: Json = False,
) -> None:
    """What does a model score on this data? Every metric with its 95 % interval."""
    from lfm import runs
    from lfm.evals import evaluate

    found = {}
    with shown(quiet=json) as show:
        records = {name: runs.records(name, show=show) for name in data}
        model = runs.model(ref, show=show)
        for name, held in records.items():

            def advance(done: int, total: int, name: str = name) -> None:
                show(f"measuring on {name}", done, total)

            found[name] = evaluate(model, held, seed=seed, samples=samples, progress=advance)
    if json:
        import msgspec

        screen.emit({name: msgspec.to_builtins(each) for name, each in found.items()})
        return
    from rich.padding import Padding
    from rich.text import Text

    console = screen.out()
    for name, each in found.items():
        console.print(Padding(screen.measures({}, each.metrics, f"{ref} on {name}"), (1, 0, 0, 2)))
        for sample in each.samples[:samples]:
            asked, said = words.short(sample.prompt, 100), words.short(sample.answer, 100)
            console.print(Text.assemble("\n  ", (asked, "dim"), "\n  ", said))
        for note in each.notes:
            console.print(Text(f"  {note}", style="dim"))
    console.print()


def compare(
    a: Annotated[str, typer.Argument(help="A model.", metavar="A")],
    b: Annotated[str, typer.Argument(help="Another.", metavar="B")],
    data: Annotated[str, typer.Option(help="Records to measure both on.", metavar="FILE")] = "",
    json: Json = False,
) -> None:
    """How do two models differ? In their facts, weights, answers, and with --data in what they score."""
    from lfm import runs

    with shown(quiet=json) as show:
        records = runs.records(data, show=show) if data else ()
        show("comparing", 0, None)
        found = runs.compare(runs.model(a, show=show), runs.model(b, show=show), records)
    if json:
        import msgspec

        screen.emit(msgspec.to_builtins(found))
    else:
        _show(a, b, data, found)


def _show(a: str, b: str, data: str, found: Comparison) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = screen.out()
    console.print(Text.assemble("\n  ", (a, "bold"), ("  against  ", "dim"), (b, "bold")), soft_wrap=True)
    if found.same:
        console.print("  [green]✓[/] the same model, to the byte\n")
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    for name, (x, y) in found.facts.items():
        grid.add_row(name, Text(f"{_fact(x)} → {_fact(y)}"))
    if found.tensors:
        grid.add_row("tensors", Text(f"{len(found.changed)} of {found.tensors} changed"))
    for name, only in (("only in A", found.only_a), ("only in B", found.only_b)):
        if only:
            grid.add_row(name, Text(words.short(", ".join(only), 100)))
    grid.add_row("answers", Text(found.answers))
    console.print(Padding(grid, (1, 0, 0, 2)))
    if found.changed:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name, side in (("tensor", "left"), ("‖Δ‖/‖A‖", "right"), ("max |Δ|", "right")):
            table.add_column(name, justify=side)  # type: ignore[arg-type]
        for change in found.changed[:8]:
            table.add_row(change.name, words.number(change.relative), words.number(change.max_abs))
        if len(found.changed) > 8:
            table.caption = f"the 8 most changed of {len(found.changed)}"
        console.print(Padding(table, (1, 0, 0, 2)))
    if found.metrics:
        console.print(Padding(screen.changes(found, f"on {data}"), (1, 0, 0, 2)))
    for sample in found.samples[:5]:
        lines = [("  " + words.short(sample.prompt, 100) + "\n", "dim")]
        lines += [
            ("  A  ", "dim"),
            words.short(sample.before, 100) + "\n",
            ("  B  ", "dim"),
            words.short(sample.after, 100),
        ]
        console.print(Text.assemble("\n", *lines))
    console.print()


def _fact(value: object) -> str:
    text = words.number(value) if isinstance(value, (int, float)) else str(value)
    return words.short(text, 40) or "–"


def register(app: typer.Typer) -> None:
    panel = "Measure"
    app.command("eval", rich_help_panel=panel)(eval_)
    app.command("compare", rich_help_panel=panel)(compare)
