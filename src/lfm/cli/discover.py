"""`lfm methods` and `lfm show`: what can be done with what you have, and how each method works."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from lfm.cli import screen
from lfm.core import config as configs
from lfm.core import registry
from lfm.core.errors import LfmError
from lfm.core.interfaces import INTERFACES, names_of
from lfm.core.method import Data
from lfm.core.registry import Listed
from lfm.record import RUN

if TYPE_CHECKING:
    from rich.text import Text

ABOUT = {
    "tune": "change a model's weights for a task",
    "prompt": "change what goes in, not the weights",
    "augment": "put a database or tools beside a frozen model",
    "distill": "teach a student what a teacher knows",
    "reuse": "ensemble, merge and select models",
    "meta": "learn to learn from few examples",
    "edit": "change single facts and behaviours",
    "probe": "find out what a model knows",
}

IMPLIED = {
    "logits": ("codec",),
    "embeddings": ("codec",),
    "features": ("codec", "logits"),
    "gradients": ("codec", "logits", "features"),
    "weights": ("codec",),
}
"""What comes along with an interface, whatever gives it."""


def level_name(level: Data) -> str:
    """NONE → "none", FEW_SHOT → "few-shot"."""
    return level.name.lower().replace("_", "-")


LEVELS = {level_name(level): level for level in Data}


SHORT = 88
"""A docstring's line below this length was ended on purpose."""

ROOM = 44
"""Columns that a summary needs to be worth a place beside its method."""


class Fit(NamedTuple):
    """How a method fits what is in hand: the interfaces and the data level that are missing.

    beside: the roles that other models play, and what these are asked, where what is in hand was kept of a model.
    """

    listed: Listed
    missing: tuple[str, ...]
    data: str
    beside: Mapping[str, list[str]] = MappingProxyType({})

    @property
    def works(self) -> bool:
        return not self.missing and not self.data

    @property
    def near(self) -> bool:
        """One more thing would make it work."""
        return len(self.missing) + bool(self.data) == 1


def parse_have(text: str) -> frozenset[type]:
    """Interfaces from names (`text,logprobs`) or from a model's reference, whose header is read to find out."""
    given: set[type] = set()
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word in INTERFACES:
            given |= {INTERFACES[name] for name in (word, *IMPLIED.get(word, ()))}
        elif ":" in word or "/" in word or Path(word).exists():
            from lfm.models import load

            given |= set(load(word).gives)
        else:
            near = get_close_matches(word, INTERFACES, n=1)
            raise LfmError(
                f"--have: no interface {word!r}",
                why=f"interfaces, from the least access to the most: {', '.join(INTERFACES)}",
                fix=f"did you mean {near[0]!r}?" if near else "or give a model: --have ./my-model, --have api:URL",
            )
    return frozenset(given)


def parse_level(text: str) -> Data:
    """A data level by name."""
    if text not in LEVELS:
        raise LfmError(f"--data: no level {text!r}", fix=f"levels, from the least to the most: {', '.join(LEVELS)}")
    return LEVELS[text]


def listed(area: str | None) -> list[Listed]:
    """The methods of an area. A third party's that cannot be imported is named on stderr and left out."""
    if area is not None and area not in registry.AREAS and not any(i.startswith(area + ".") for i in registry.ids()):
        near = get_close_matches(area, registry.AREAS, n=1)
        raise LfmError(
            f"no area {area!r}",
            fix=f"did you mean {near[0]!r}?" if near else f"areas: {', '.join(registry.AREAS)}",
        )
    found = []
    for id, module in registry.ids().items():
        if area is not None and id.split(".")[0] != area:
            continue
        try:
            found.append(registry.get(id))
        except Exception as error:
            if module.startswith("lfm."):
                raise
            sys.stderr.write(f"left out {id}: {module} cannot be imported ({error})\n")
    return found


def fit(method: Listed, have: frozenset[type] | None, level: Data | None) -> Fit:
    """What a method still asks beyond this access and this much data."""
    models, asked = method.method.models, method.method.level
    data = level_name(asked) if level is not None and asked > level else ""
    if roles := registry.standing(method.method, have or ()):
        others = {role: slot.asked for role, slot in models.items() if slot.min > 0 and role not in roles}
        return Fit(method, (), data, others)
    missing = names_of(registry.lacking(method.method, have)) if have is not None else []
    return Fit(method, tuple(missing), data)


def facts(item: Fit) -> dict[str, Any]:
    """A method as scripts read it."""
    method = item.listed.method
    return {
        "id": item.listed.id,
        "area": item.listed.area,
        "summary": item.listed.summary,
        "paper": method.paper,
        "gives": method.gives,
        "models": {
            role: {
                "needs": names_of(slot.needs),
                "any_of": names_of(slot.any_of),
                "min": slot.min,
                "max": slot.max,
                "help": slot.help,
            }
            for role, slot in method.models.items()
        },
        "data": {
            role: {"level": level_name(s.level), "kinds": list(s.kinds), "optional": s.optional, "help": s.help}
            for role, s in method.data.items()
        },
        "level": level_name(method.level),
        "works": item.works,
        "missing": list(item.missing),
        "beside": dict(item.beside),
        "missing_data": item.data or None,
    }


def asked(method: Listed) -> list[str]:
    """The interfaces worth showing: codec comes along with the others."""
    slots = [slot for slot in method.method.models.values() if slot.min > 0]
    either = [name for slot in slots if not slot.needs for name in names_of(slot.any_of)[:1]]  # the least that will do
    names = list(dict.fromkeys([*names_of({kind for slot in slots for kind in slot.needs}), *either]))
    return [name for name in names if name != "codec"] or names


def _line(item: Fit) -> list[Text]:
    from rich.text import Text

    method = item.listed
    level = level_name(method.method.level)
    if item.works:
        name = Text(method.id, style="bold")
        access = screen.badges(asked(method), screen.ACCESS)
        if item.beside:
            wanted = (f"{role}: {', '.join(n for n in kinds if n != 'codec')}" for role, kinds in item.beside.items())
            access = Text(f"+ {'; '.join(wanted)}", style="yellow")
        return [name, Text(method.summary), access, _data(level)]
    gap = " and ".join([*item.missing, *([f"{item.data} data"] if item.data else [])])
    return [Text(method.id, style="dim"), Text(method.summary, style="dim"), Text(f"+ {gap}", style="yellow"), Text("")]


def _data(level: str) -> Text:
    label = "no data" if level == "none" else level
    return screen.badge(label, screen.DATA[level])


def methods(
    area: Annotated[str | None, typer.Argument(help=f"One of {', '.join(registry.AREAS)}.")] = None,
    have: Annotated[
        str, typer.Option(help="What each model gives: text,logprobs,… or a model's reference.", metavar="ACCESS")
    ] = "",
    data: Annotated[
        str, typer.Option(help=f"The data in hand: {', '.join(LEVELS)}.", metavar="LEVEL", show_default=False)
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What can I do with what I have? All methods, or those that work with this access and this data first."""
    given = parse_have(have) if have else None
    level = parse_level(data) if data else None
    fits = [fit(method, given, level) for method in listed(area)]
    if json:
        screen.emit([facts(item) for item in fits])
        return
    console = screen.out()
    asking = given is not None or level is not None
    works, near = [f for f in fits if f.works], [f for f in fits if f.near]
    if given and registry.KEPT.issuperset(given):  # what a method that does not take it lacks is all that it needs
        near = [f for f in near if f.beside]
    console.print()
    if asking:
        console.print(f"  [bold]{len(works)}[/] of {len(fits)} methods work with {_hand(given, level)}")
    else:
        console.print(f"  [bold]{len(fits)} methods[/], from models you have to the model you need")
    _groups(works)
    if asking and near:
        console.print("\n  [yellow]With one thing more[/]")
        _groups(near, heads=False)
    _hints(works or fits, asking)


def _hand(given: frozenset[type] | None, level: Data | None) -> str:
    access = ", ".join(n for n in names_of(given or ()) if n != "codec")
    parts = [access] if given is not None else []
    if level is not None:
        parts.append("no data" if level == Data.NONE else f"{level_name(level)} data")
    return " and ".join(part for part in parts if part) or "nothing"


def _groups(fits: list[Fit], *, heads: bool = True) -> None:
    """Methods by area: one line each where there is room for the summary beside the badges, else two."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = screen.out()
    lines = [_line(item) for item in fits]
    widths = [max((line[i].cell_len for line in lines), default=0) for i in range(4)]
    room = console.width - 2 - sum(widths[i] + 2 for i in (0, 2, 3))
    for area, group in groupby(zip(fits, lines), key=lambda pair: pair[0].listed.area if heads else ""):
        if heads:
            console.print(
                Text.assemble("\n  ", (area, "bold cyan"), "  ", (ABOUT.get(area, "third party"), "dim italic"))
            )
        table = Table.grid(padding=(0, 2))
        for i in (0, 1, 2, 3) if room >= ROOM else (0, 2, 3):
            table.add_column(no_wrap=True, width=min(widths[i], room) if i == 1 else widths[i])
        for _, (name, summary, access, data) in group:
            if room >= ROOM:
                summary.truncate(room, overflow="ellipsis")
                table.add_row(name, summary, access, data)
            else:
                name.pad_right(widths[0] + 2 - name.cell_len)
                console.print(Padding(Text.assemble(name, access, "  " if access.cell_len else "", data), (0, 0, 0, 2)))
                summary.stylize("dim")
                console.print(Padding(summary, (0, 0, 0, 4)))
        if table.row_count:
            console.print(Padding(table, (0, 0, 0, 2)))


def _hints(fits: list[Fit], asking: bool) -> None:
    from rich.padding import Padding
    from rich.table import Table

    grid = Table.grid(padding=(0, 3))
    if not asking:
        grid.add_row("lfm methods --have text,logprobs --data none", "[dim]with an API and no data[/]")
        grid.add_row("lfm methods --have ./my-model", "[dim]with the model in this folder[/]")
    example = fits[0].listed.id if fits else "edit.rome"
    grid.add_row(f"lfm show {example}", "[dim]how one works[/]")
    screen.out().print(Padding(grid, (1, 0, 1, 2)))


def show(
    id: Annotated[str, typer.Argument(help="A method, as `lfm methods` lists it.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of its settings.")] = False,
) -> None:
    """How a method works: its idea, what it asks for, its settings, and a command line to start from."""
    if id not in registry.ids() and (Path(id) / RUN).is_file():
        raise LfmError(
            f"{id} is what a run made; `lfm show` tells of methods",
            fix=f"its page is {Path(id) / 'report.html'}; `lfm lineage {id}` tells what it was made from",
        )
    method = registry.get(id)
    if schema:
        screen.emit(configs.schema(method.method.config))
    elif json:
        settings = [
            {"name": f.name, "type": f.type, "default": f.default, "help": f.help}
            for f in configs.fields(method.method.config)
        ]
        known = facts(fit(method, None, None))
        for key in ("works", "missing", "beside", "missing_data"):
            known.pop(key)
        screen.emit(known | {"doc": method.doc, "settings": settings, "example": example(method)})
    else:
        _show(method)


def example(method: Listed) -> str:
    """A command line that names every required role."""
    words = [f"lfm run {method.id}"]
    for role, slot in method.method.models.items():
        words += [f"{role}={'REF' if slot.min > 1 else 'MODEL'}"] * max(slot.min, 0)
    for role, slot in method.method.data.items():
        if not slot.optional:
            words.append(f"{role}={role}.jsonl")
    return " ".join([*words, f"--out runs/{method.id.split('.')[-1]}"])


def _show(method: Listed) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = screen.out()
    lines = method.doc.split("\n", 1)
    console.print(Text.assemble("\n  ", (method.id, "bold cyan"), "  ", (lines[0], "bold")))
    if len(lines) > 1 and lines[1].strip():
        console.print(Padding(_document(lines[1].strip("\n")), (1, 0, 0, 2)))
    asks = Table.grid(padding=(0, 2))
    for role, slot in method.method.models.items():
        many = "" if slot.max == 1 else f"{slot.min} or more" if slot.max is None else f"{slot.min} to {slot.max}"
        note = "; ".join(filter(None, ("optional" if slot.min == 0 else many, slot.help)))
        asks.add_row(Text(role, style="bold"), screen.badges(slot.asked, screen.ACCESS), Text(note, "dim"))
    for role, slot in method.method.data.items():
        kinds = " or ".join(slot.kinds) + " records" if slot.kinds else ""
        note = "; ".join(filter(None, ("optional" if slot.optional else "", kinds, slot.help)))
        asks.add_row(Text(role, style="bold"), _data(level_name(slot.level)), Text(note, "dim"))
    console.print(Padding(Text("Asks for", "bold cyan"), (1, 0, 0, 2)))
    console.print(Padding(asks, (0, 0, 0, 2)))
    console.print(Padding(Text("Gives", "bold cyan"), (1, 0, 0, 2)))
    console.print(f"  {'a finding: a table with its evidence' if method.method.gives == 'finding' else 'a model'}")
    settings = Table.grid(padding=(0, 2))
    for field in configs.fields(method.method.config):
        settings.add_row(
            Text(field.name, style="bold"), Text(str(field.default)), Text(field.type, "cyan"), Text(field.help, "dim")
        )
    if settings.row_count:
        console.print(Padding(Text("Settings", "bold cyan"), (1, 0, 0, 2)))
        console.print(Padding(settings, (0, 0, 0, 2)))
    console.print(Padding(Text("Start here", "bold cyan"), (1, 0, 0, 2)))
    line = example(method)
    console.print(f"  {line.replace('lfm run', 'lfm plan', 1)}   [dim]what it would take[/]", soft_wrap=True)
    console.print(f"  {line}", soft_wrap=True)
    console.print(f"\n  [dim]{method.method.paper}[/]\n", soft_wrap=True)


def _document(text: str) -> Text:
    """A docstring: paragraphs flow, indented blocks are formulas and examples and keep their lines."""
    from rich.text import Text

    rendered = Text()
    for block in text.split("\n\n"):
        lines = block.split("\n")
        if lines[0].startswith((" ", ">>>")):
            for line in lines:
                rendered.append(
                    line + "\n", style="green" if line.lstrip().startswith((">>>", "...", "lfm ")) else "yellow"
                )
        else:
            rendered.append(_flowing(lines) + "\n")
        rendered.append("\n")
    rendered.rstrip()
    return rendered


def _flowing(lines: list[str]) -> str:
    """Lines joined into paragraphs; a short line ends one."""
    told = ""
    for line in lines:
        told += line + (" " if len(line) > SHORT else "\n")
    return told.strip()


def register(app: typer.Typer) -> None:
    panel = "Find out"
    app.command("methods", rich_help_panel=panel)(methods)
    app.command("show", rich_help_panel=panel)(show)
