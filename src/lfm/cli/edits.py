"""`lfm edit`: facts changed one patch after another, each of which comes off again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from lfm.cli import orders, screen, work
from lfm.cli.converse import chat
from lfm.cli.progress import shown
from lfm.core.errors import SlotError

if TYPE_CHECKING:
    from lfm.core.model import Model
    from lfm.runs.patches import Ledger, Patch

T = TypeVar("T")

Directory = Annotated[Path, typer.Argument(help="The ledger's directory.", metavar="DIR")]
Number = Annotated[int, typer.Argument(help="The patch's number, as `lfm edit log` shows it.", metavar="N")]

FACTS, MOVED, TOKENS = 3, 8, 8
"""Facts of a patch that a line names, answers beside its own that are shown, and tokens of one at least."""


def add(
    directory: Directory,
    edits: Annotated[str, typer.Argument(help="Facts to change: a file of edits.", metavar="EDITS")],
    words: Annotated[
        list[str] | None, typer.Argument(help="What else the editor learns from: practice=FILE …", metavar="ROLE=FILE")
    ] = None,
    model: Annotated[str, typer.Option(help="The model to edit; asked for once, when the ledger begins.")] = "",
    by: Annotated[
        str, typer.Option(help="The editor.", metavar="METHOD", show_default="edit.rome, or the memory's own")
    ] = "",
    sets: work.Sets = None,
    text: Annotated[str, typer.Option(help="Running text that should stay as it is.", metavar="FILE")] = "",
    seed: work.Seed = None,
    recall: Annotated[
        float, typer.Option(min=0, max=1, help="Least share of the earlier edits that must still be said.")
    ] = 1.0,
    json: work.Json = False,
) -> None:
    """Change facts, on top of what was changed before; commit it as a patch, or refuse and leave all as it was."""
    from lfm import report
    from lfm.runs import patches

    def page(made: Path) -> None:
        report.write(made, name=directory.name)

    with shown(quiet=json) as show:
        patch = patches.add(
            directory,
            edits,
            base=model,
            by=by,
            settings=orders.settings(sets or ()),
            data=_data(words or (), text),
            seed=seed or 0,
            recall=recall,
            show=show,
            report=page,
        )
    if json:
        screen.emit(_plain(patch))
        return
    screen.out().print(f"[green]✓[/] patch {patch.number}: {_facts(patch)}", soft_wrap=True)
    kind = "a program" if patches.read(directory).memory else "a PEFT adapter"
    screen.out().print(f"  the model is {directory / patches.HEAD}, {kind}", soft_wrap=True)
    screen.out().print(f"  the page  {directory / patch.place / report.REPORT}", soft_wrap=True)


def log(directory: Directory, json: work.Json = False) -> None:
    """What was changed, in order, and what of it is on."""
    from rich.table import Table

    from lfm.runs import patches

    ledger = patches.read(directory)
    if json:
        screen.emit(_plain(ledger))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("N", "", "method", "facts", "said when made", "made"):
        table.add_column(column)
    for patch in ledger.patches:
        said = patch.measured.get("efficacy")
        table.add_row(
            str(patch.number),
            "on" if patch.on else "[dim]off[/]",
            patch.method,
            _facts(patch),
            "" if said is None else f"{said:.0%}",
            patch.made,
        )
    screen.out().print(f"over {ledger.base}  [dim]{ledger.base_digest[:12]}[/]", soft_wrap=True)
    screen.out().print(table)


def diff(directory: Directory, number: Number, json: work.Json = False) -> None:
    """What a patch does: to the weights, to its own facts, and to what lies around them."""
    from lfm.core.interfaces import Logprobs, Text
    from lfm.data.answers import room
    from lfm.runs import interference

    found = interference.beside(directory, number)
    patch, moved, again = found.patch, found.moved, interference.again(found)
    asked = [edit.prompt for edit in patch.edits]
    most = max(TOKENS, room([edit.new_object for edit in patch.edits]))
    around = [prompt for edit in patch.edits for prompt, _ in edit.neighbours]

    def said(model: Model) -> list[str]:
        if model.can(Text):
            return [_line(text) for text in model.ask(Text).generate([*asked, *around], max_tokens=most)]
        gaps = [edit.suffix for edit in patch.edits] + [edit.suffix for edit in patch.edits for _ in edit.neighbours]
        return [_line(best[0][0]) for best in model.ask(Logprobs).top([*asked, *around], 1, gaps)]

    before, after = said(found.without), said(found.together)
    rows = list(zip([*asked, *around], before, after))
    others = [row for row in rows[len(asked) :] if row[1] != row[2]]
    if json:
        screen.emit(
            {
                "patch": _plain(patch),
                "modules": [
                    {
                        "module": m.module,
                        "rank": m.rank,
                        "norm": m.norm,
                        "overlap": dict(m.overlap),
                        "reads": dict(m.reads),
                    }
                    for m in moved
                ],
                "facts": [dict(zip(("prompt", "before", "after"), row)) for row in rows[: len(asked)]],
                "around": {
                    "asked": len(around),
                    "changed": [dict(zip(("prompt", "before", "after"), r)) for r in others],
                },
                "others": [a._asdict() for a in again],
            }
        )
        return
    out = screen.out()
    for m in moved:
        what = f"{m.rank} edits" if m.norm is None else f"rank {m.rank}, ‖ΔW‖ {m.norm:.3g}"
        out.print(f"{m.module}  {what}", soft_wrap=True)
        nearest, more = _most(m.reads.items(), lambda each: -abs(each[1]))
        for other, read in nearest:
            alike = f"; of the changes {m.overlap[other]:+.2f}" if other in m.overlap else ""
            out.print(f"  [dim]patch {other}: cosine of the nearest keys {read:+.2f}{alike}[/]", soft_wrap=True)
        _and(more)
    for prompt, old, new in rows[: len(asked)]:
        prompt, old, new = map(screen.escaped, (prompt, old, new))
        out.print(f"\n{prompt}\n  [red]- {old}[/]\n  [green]+ {new}[/]", soft_wrap=True)
    if around:
        out.print(f"\nof {len(around)} prompts around them {len(others)} are answered otherwise now")
    for prompt, old, new in others[:MOVED]:
        prompt, old, new = map(screen.escaped, (prompt, old, new))
        out.print(f"  {prompt} [red]{old}[/] → [green]{new}[/]", soft_wrap=True)
    if again:
        out.print("\nfacts of the other patches that are said, without it and with it:")
    hurt, more = _most(again, lambda a: (a.together - a.without, a.patch))
    for a in hurt:
        told = f"{a.without} → {a.together} of {a.facts}"
        out.print(f"  patch {a.patch}: " + (f"[red]{told}[/]" if a.together < a.without else told))
    _and(more)


def _most(found: Iterable[T], order: Callable[[T], Any]) -> tuple[list[T], int]:
    """The first by an order, as they come, and how many others there are."""
    every = list(found)
    first = sorted(range(len(every)), key=lambda place: order(every[place]))[:MOVED]
    return [every[place] for place in sorted(first)], len(every) - len(first)


def _and(more: int) -> None:
    if more:
        screen.out().print(f"  [dim]and {more} other patch{'es' if more > 1 else ''}[/]")


def revert(directory: Directory, number: Number) -> None:
    """Take a patch off. The others stay as they are."""
    from lfm.runs import patches

    ledger = patches.revert(directory, number)
    what = f"{directory / patches.HEAD} is the others" if ledger.head else f"the model is {ledger.base} again"
    screen.out().print(f"[green]✓[/] patch {number} is off; {what}", soft_wrap=True)


def squash(directory: Directory) -> None:
    """Make one patch of all that are on; those that are off are forgotten."""
    from lfm.runs import patches

    ledger = patches.squash(directory)
    screen.out().print(f"[green]✓[/] one patch: {_facts(ledger.patches[-1])}", soft_wrap=True)


def _data(words: Sequence[str], text: str) -> dict[str, str]:
    """What an editor is given beside the edits, by role. SlotError for a role that is given twice."""
    given = [*orders.pairs(words, "ROLE=FILE"), *([("text", text)] if text else [])]
    roles = ["edits", *(role for role, _ in given)]
    if twice := next((role for role in roles if roles.count(role) > 1), ""):
        raise SlotError(f"{twice!r} is given twice", why="one file fills a data role", fix="put the records together")
    return dict(given)


def _facts(patch: Patch) -> str:
    named = [f"{edit.subject}: {edit.object or '?'} → {edit.new_object}" for edit in patch.edits[:FACTS]]
    more = len(patch.edits) - len(named)
    return screen.escaped(", ".join(named)) + (f" and {more} more" if more > 0 else "")


def _line(text: str) -> str:
    return " ".join(text.split())


def _plain(value: Ledger | Patch) -> Any:
    import msgspec

    return msgspec.to_builtins(value)


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Change facts, patch by patch; any patch comes off again.")
    commands = (("add", add), ("chat", chat), ("log", log), ("diff", diff), ("revert", revert), ("squash", squash))
    for name, command in commands:
        group.command(name)(command)
    app.add_typer(group, name="edit", rich_help_panel="Make")
