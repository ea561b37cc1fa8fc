"""`lfm report`, `verify`, `lineage` and `undo`: what can be asked of something that was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lfm.cli import screen
from lfm.core.errors import LfmError
from lfm.core.writing import writing
from lfm.report import words

if TYPE_CHECKING:
    from rich.tree import Tree

    from lfm.runs import Node

Directory = Annotated[Path, typer.Argument(help="A run's directory.", metavar="DIR")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else on stdout.")]


def report(
    directories: Annotated[
        list[Path], typer.Argument(help="A run, a recipe's output, or several runs.", metavar="DIR…")
    ],
    out: Annotated[Path | None, typer.Option(help="The file to write.", show_default="DIR/report.html")] = None,
) -> None:
    """Make the page that people look at: one HTML file that needs no network."""
    from lfm import report as reports

    if out is None and len(directories) == 1:
        written = reports.write(directories[0])
    else:
        written = out or Path(reports.REPORT)
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(reports.page(directories), encoding="utf-8")
    print(written)


def verify(directory: Directory, json: Json = False) -> None:
    """Is the model still what its run made? Its bytes by digest, its answers on the probe; not the page beside it."""
    from lfm import runs
    from lfm.report.gather import RECIPE, whole_of

    places = [directory]
    if (directory / RECIPE).is_file():
        places = [directory / part.folder for part in whole_of(directory).parts]
    found = {}
    for place in places:
        found[place] = runs.verify(place)
        if not json:
            screen.out().print(f"[green]✓[/] {place}  {found[place]}", soft_wrap=True)
    if json:
        import msgspec

        results = [{"dir": str(place)} | msgspec.to_builtins(each) for place, each in found.items()]
        screen.emit(results if len(places) > 1 else results[0])


def lineage(
    ref: Annotated[Path | None, typer.Argument(help="A run's directory.", metavar="DIR")] = None,
    html: Annotated[Path | None, typer.Option(help="Draw it as a page.", metavar="FILE")] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw it as an SVG file.", metavar="FILE")] = None,
    rebuild: Annotated[
        Path | None, typer.Option(help="Rebuild the ledger from the runs below a directory.", metavar="DIR")
    ] = None,
    json: Json = False,
) -> None:
    """What was this made from? As a tree, and with --svg or --html as a picture."""
    from lfm import runs

    if rebuild is not None:
        from lfm.runs import ledger

        count = ledger.rebuild(rebuild)
        screen.err().print(f"the ledger knows {count} run{'s' if count != 1 else ''} below {rebuild}")
    if ref is None:
        if rebuild is None:
            raise LfmError("lineage of what?", fix="give a run's directory: lfm lineage runs/rome")
        return
    found = runs.lineage(ref)
    for path, alone in ((svg, True), (html, False)):
        if path is not None:
            _draw(found, path, page=not alone)
    if json:
        import msgspec

        screen.emit([msgspec.to_builtins(node) for node in found.values()])
    elif html is None and svg is None:
        screen.out().print(tree(found))
    else:
        print(svg or html)


def tree(found: Mapping[str, Node]) -> Tree:
    """The output, its parents below it, and so on; what was shown already is not spelled out again."""
    from rich.text import Text
    from rich.tree import Tree

    shown: set[str] = set()

    def label(digest: str, role: str) -> Text:
        node = found[digest]
        text = Text.assemble((node.label, "bold"))
        text.append(f"  {node.method}" if node.method else f"  {node.kind}", style="cyan" if node.method else "dim")
        text.append(f"  as {role}" if role not in ("", "model", "models") else "", style="dim")
        return text.append(f"  {digest[:8]}", style="dim")

    def grow(branch: Tree, digest: str) -> None:
        if digest in shown:
            if found[digest].parents:
                branch.add(Text("(as above)", style="dim"))
            return
        shown.add(digest)
        for parent, role in found[digest].parents:
            if parent in found:
                grow(branch.add(label(parent, role)), parent)

    first = next(iter(found))
    root = Tree(label(first, ""), guide_style="dim")
    grow(root, first)
    return root


def _draw(found: Mapping[str, Node], path: Path, *, page: bool) -> None:
    from lfm.report import lineage as pictures

    nodes = [
        pictures.Node(
            id=digest,
            lines=(node.label, node.method or node.kind, digest[:8]),
            kind="source" if not node.method else "finding" if node.kind == "finding" else "model",
        )
        for digest, node in found.items()
    ]
    edges = [(parent, digest) for digest, node in found.items() for parent, _ in node.parents]
    picture = pictures.svg(nodes, edges, alone=True)
    title = words.short(next(iter(found.values())).label, 80)
    beside = path.with_name(f".{path.name}.part")
    try:
        with writing(f"{path} cannot be written"):
            beside.write_text(_page(title, picture) if page else picture, encoding="utf-8")
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _page(title: str, picture: str) -> str:
    from html import escape

    return (
        f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{escape(title)}: lineage</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<body style="margin:2rem;text-align:center">{picture}</body></html>\n'
    )


def undo(
    directory: Directory,
    out: Annotated[Path, typer.Option(help="Where the model goes as it was before.", metavar="OUT")],
) -> None:
    """Take an edit or an adapter off again: the base's bytes come back."""
    from lfm import runs

    digest = runs.undo(directory, out)
    screen.out().print(f"[green]✓[/] {out} is the base again, to the byte  [dim]{digest[:12]}[/]", soft_wrap=True)


def register(app: typer.Typer) -> None:
    panel = "Look at what was made"
    for name, command in (("report", report), ("verify", verify), ("lineage", lineage), ("undo", undo)):
        app.command(name, rich_help_panel=panel)(command)
