"""What the models of a page came from, as boxes and edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lfm import record as records
from lfm.core.errors import LfmError
from lfm.record import Input, RunRecord
from lfm.report.lineage import Node
from lfm.report.measured import MANY, gist, tail

if TYPE_CHECKING:
    from lfm.report.gather import Chapter


def ancestry(
    chapters: Sequence[Chapter], needs: Mapping[str, Sequence[str]]
) -> tuple[list[Node], list[tuple[str, str]]]:
    """The lineage's boxes: what came from outside, then one a run; its edges by path, by digest and by need."""
    made_by_digest = {c.record.output.digest: c.anchor for c in reversed(chapters)}
    by_name = {c.name: c.anchor for c in chapters}
    sources: dict[str, Node] = {}
    edges: dict[tuple[str, str], None] = {}
    order = {c.anchor: c.number for c in chapters}
    for chapter in chapters:
        for need in needs.get(chapter.name, ()):
            if need in by_name:
                edges[by_name[need], chapter.anchor] = None
        for given in chapter.record.inputs:
            parent = made_by_digest.get(given.digest)
            if parent is not None and order[parent] < chapter.number:
                edges[parent, chapter.anchor] = None
            elif not given.ref.startswith("serve:") or not needs:
                key = given.digest or given.ref
                edges[key, chapter.anchor] = None
                for node, parents in _before(given):
                    sources.setdefault(node.id, node)
                    edges |= {(parent, node.id): None for parent in parents}
    made = [
        Node(
            id=c.anchor,
            lines=(c.name, c.method, *([gist(c.record)] if gist(c.record) else [])),
            kind="finding" if c.record.output.kind == "finding" else "model",
            href=f"#{c.anchor}",
        )
        for c in chapters
    ]
    return _gathered([*sources.values()], made, list(edges))


def _gathered(
    sources: list[Node], made: list[Node], edges: list[tuple[str, str]]
) -> tuple[list[Node], list[tuple[str, str]]]:
    """Many sources that all go to the same runs, drawn as one box that names them."""
    children: dict[str, list[str]] = {}
    ends = {b for _, b in edges}
    for a, b in edges:
        children.setdefault(a, []).append(b)
    alike: dict[tuple[str, ...], list[Node]] = {}
    for node in sources:
        if node.kind == "source" and node.id not in ends:
            alike.setdefault(tuple(sorted(children.get(node.id, []))), []).append(node)
    kept = {node.id: node for node in sources}
    for group in alike.values():
        if len(group) >= MANY:
            first = group[0]
            for node in group[1:]:
                del kept[node.id]
            names = [node.lines[0] for node in group]
            shown = [*names[:2], f"… {names[-1]}"]
            kept[first.id] = Node(id=first.id, lines=(f"{len(group)} models", *shown), kind="source")
            gone = {node.id for node in group[1:]}
            edges = [(a, b) for a, b in edges if a not in gone]
    return [*kept.values(), *made], edges


def _before(given: Input, seen: frozenset[str] = frozenset()) -> list[tuple[Node, list[str]]]:
    """An input as a box, and what it was made from as far as that still lies there; each with its parents' ids."""
    key = given.digest or given.ref
    made = _made(given)
    if made is None or key in seen:
        return [(Node(id=key, lines=(tail(given.ref), given.kind), kind="source"), [])]
    parents = [i.digest or i.ref for i in made.inputs]
    node = Node(id=key, lines=(made.title or Path(given.path).name, made.id, gist(made)))
    return [(node, parents), *(pair for i in made.inputs for pair in _before(i, seen | {key}))]


def _made(given: Input) -> RunRecord | None:
    """The run that made an input, where its directory is what it was then."""
    if not given.path or not (Path(given.path) / records.RUN).is_file():
        return None
    try:
        made = records.read(Path(given.path))
    except LfmError:
        return None
    return made if made.output.digest == given.digest else None
