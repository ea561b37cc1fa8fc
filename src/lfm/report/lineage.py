"""The lineage picture: a layered drawing of what was made from what, as SVG that a page or a file can hold.

Layers are topological generations. An edge that spans several layers gets a place of its own in each, so
that no edge runs through a box; order within a layer follows the mean place of the neighbours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from graphlib import CycleError, TopologicalSorter
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple, final

import msgspec

from lfm.report.words import short

CHARACTER = 6.7
"""Width of a character at 12 px, a little more than the widest common sans serif needs on average."""

SWEEPS = 12

Item = Any
"""What has a place in a layer: a node's id, or the (source, target, layer) of an edge that passes through."""


@final
class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One box. kind: "source" (came from outside), "model", "finding". lines: title first, then smaller lines."""

    id: str
    lines: tuple[str, ...]
    kind: str = "model"
    href: str = ""


class Box(NamedTuple):
    """Where a node is drawn, in px: the upper left corner and the size."""

    x: float
    y: float
    width: float
    height: float


@final
class Drawing(msgspec.Struct, frozen=True, kw_only=True):
    """A laid-out lineage. paths: points each edge goes through, from source to target."""

    width: float
    height: float
    boxes: dict[str, Box]
    paths: dict[tuple[str, str], list[tuple[float, float]]]
    across: bool


def lay_out(nodes: Sequence[Node], edges: Iterable[tuple[str, str]], *, across: bool = True) -> Drawing:
    """Boxes without overlap, left to right (across) or top to bottom. ValueError if the edges make a circle."""
    known = {node.id: node for node in nodes}
    drawn = list(dict.fromkeys((a, b) for a, b in edges if a in known and b in known and a != b))
    layers = _generations(known, drawn)
    depth = {node: i for i, layer in enumerate(layers) for node in layer}
    _pull_sources(drawn, layers, depth)
    chains, links = {}, []
    for a, b in sorted(drawn, key=lambda edge: list(known).index(edge[0])):
        between = [(a, b, level) for level in range(depth[a] + 1, depth[b])]
        for level, dummy in zip(range(depth[a] + 1, depth[b]), between):
            layers[level].append(dummy)
        chains[a, b] = [a, *between, b]
        links += pairwise(chains[a, b])
    _order(layers, links)
    return _place(known, layers, chains, links, across)


def svg(nodes: Sequence[Node], edges: Iterable[tuple[str, str]], *, across: bool = True, alone: bool = False) -> str:
    """The lineage as SVG. alone: with its own style, for a file of its own; else the page's style applies."""
    drawing = lay_out(nodes, edges, across=across)
    tip = f"tip-{'across' if across else 'down'}"
    parts = [
        f'<path class="edge" marker-end="url(#{tip})" d="{_curve(points, across)}"/>'
        for points in drawing.paths.values()
    ]
    for node in nodes:
        parts.append(_box(node, drawing.boxes[node.id]))
    style = f"<style>{STYLE}</style>" if alone else ""
    space = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
    width, height = round(drawing.width, 1), round(drawing.height, 1)
    return (
        f'<svg{space} class="lineage" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="What was made from what">{style}'
        f'<defs><marker id="{tip}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path class="tip" d="M0 0.6 L7 4 L0 7.4 z"/></marker></defs>{"".join(parts)}</svg>'
    )


def _generations(nodes: Iterable[str], edges: Iterable[tuple[str, str]]) -> list[list[Item]]:
    """Nodes by the length of the longest way that leads to them."""
    sorter = TopologicalSorter(dict.fromkeys(nodes, ()))
    for a, b in edges:
        sorter.add(b, a)
    try:
        sorter.prepare()
    except CycleError:
        raise ValueError("a lineage has no circles") from None
    layers: list[list[Item]] = []
    while sorter.is_active():
        layers.append(list(sorter.get_ready()))
        sorter.done(*layers[-1])
    return layers


def _pull_sources(edges: Sequence[tuple[str, str]], layers: list[list[Item]], depth: dict[Item, int]) -> None:
    """Move what has no parents next to its first child, so that its edge is short."""
    for node in list(layers[0]) if layers else []:
        children = [depth[b] for a, b in edges if a == node]
        if children and min(children) > 1:
            layers[0].remove(node)
            depth[node] = min(children) - 1
            layers[depth[node]].append(node)


def _order(layers: list[list[Item]], links: list[tuple[Item, Item]]) -> None:
    """Sort each layer by the mean place of its neighbours in the layer before, then after, several times."""
    parents: dict[Item, list[Item]] = {}
    children: dict[Item, list[Item]] = {}
    for a, b in links:
        parents.setdefault(b, []).append(a)
        children.setdefault(a, []).append(b)
    best, fewest = [list(layer) for layer in layers], _crossings(layers, children)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        near = parents if down else children
        for layer in layers if down else reversed(layers):
            place = {node: i for other in layers for i, node in enumerate(other)}
            layer.sort(key=lambda n: _mean([place[m] for m in near.get(n, ())], place[n]))
        crossed = _crossings(layers, children)
        if crossed < fewest:
            best, fewest = [list(layer) for layer in layers], crossed
    layers[:] = best


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _crossings(layers: list[list[Item]], children: dict[Item, list[Item]]) -> int:
    total = 0
    for left, right in pairwise(layers):
        place = {node: i for i, node in enumerate(right)}
        ends = [place[child] for node in left for child in sorted(children.get(node, ()), key=place.__getitem__)]
        total += sum(a > b for i, a in enumerate(ends) for b in ends[i + 1 :])
    return total


def _place(
    known: dict[str, Node],
    layers: list[list[Item]],
    chains: dict[tuple[str, str], list[Item]],
    links: list[tuple[Item, Item]],
    across: bool,
) -> Drawing:
    sizes = {node.id: _size(node) for node in known.values()}
    gap, lane, least = (18.0, 10.0, 44.0) if across else (18.0, 10.0, 40.0)
    level_of = {item: level for level, layer in enumerate(layers) for item in layer}
    crowd = Counter(level_of[a] for a, _ in links)

    def thick(item: Item) -> float:
        """Extent along the layer."""
        return (sizes[item][1] if across else sizes[item][0]) if item in sizes else lane

    def deep(item: Item) -> float:
        """Extent across the layers."""
        return (sizes[item][0] if across else sizes[item][1]) if item in sizes else 0.0

    middle = _spread(layers, links, thick, gap)
    low = min((middle[n] - thick(n) / 2 for n in middle), default=0.0)
    high = max((middle[n] + thick(n) / 2 for n in middle), default=0.0)
    edge = 6.0
    boxes: dict[str, Box] = {}
    spans: dict[Item, tuple[float, float]] = {}
    at, between = edge, least
    for level, layer in enumerate(layers):
        between = least + min(60.0, max(0, crowd[level] - 4) * 3.0)  # room for many edges to part
        depth = max((deep(item) for item in layer), default=0.0)
        for item in layer:
            spans[item] = (at, at + depth)
            if item in sizes:
                width, height = sizes[item]
                along, start = middle[item] - low + edge, at + (depth - deep(item)) / 2
                x, y = (start, along - height / 2) if across else (along - width / 2, start)
                boxes[item] = Box(round(x, 1), round(y, 1), width, height)
        at += depth + between
    paths = {}
    for pair, chain in chains.items():
        points: list[tuple[float, float]] = []
        for item in chain:
            along = middle[item] - low + edge
            start, end = spans[item]
            ends = [start, end]
            if item in boxes:
                box = boxes[item]
                near, far = (box.x, box.x + box.width) if across else (box.y, box.y + box.height)
                ends = [far, end] if item == pair[0] else [start, near]
            points += [(e, along) if across else (along, e) for e in ends]
        paths[pair] = points
    depth_total, along_total = max(at - between + edge, 2 * edge), high - low + 2 * edge
    width, height = (depth_total, along_total) if across else (along_total, depth_total)
    return Drawing(width=width, height=height, boxes=boxes, paths=paths, across=across)


def _spread(
    layers: list[list[Item]], links: list[tuple[Item, Item]], thick: Callable[[Item], float], gap: float
) -> dict[Item, float]:
    """Each item's middle along its layer: near its neighbours' mean, and never closer than gap to the next item."""
    near: dict[Item, list[Item]] = {}
    for a, b in links:
        near.setdefault(a, []).append(b)
        near.setdefault(b, []).append(a)
    middle: dict[Item, float] = {}
    for layer in layers:
        at = 0.0
        for item in layer:
            middle[item] = at + thick(item) / 2
            at += thick(item) + gap
        for item in layer:
            middle[item] -= (at - gap) / 2
    for sweep in range(2 * SWEEPS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            wish = [_mean([middle[n] for n in near.get(item, ())], middle[item]) for item in layer]
            for item, place in zip(layer, _apart(wish, [thick(item) for item in layer], gap)):
                middle[item] = place
    return middle


def _apart(wish: list[float], thick: list[float], gap: float) -> list[float]:
    """Places in the same order, far enough apart, with the least squared distance to the wishes (pool adjacent
    violators)."""
    offsets, total = [], 0.0
    for i, width in enumerate(thick):
        total += (thick[i - 1] / 2 + gap + width / 2) if i else 0.0
        offsets.append(total)
    blocks: list[list[float]] = []  # mean, weight
    for place, offset in zip(wish, offsets):
        blocks.append([place - offset, 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2], blocks.pop()
            blocks[-1] = [(a * m + b * n) / (m + n), m + n]
    flat = [mean for mean, weight in blocks for _ in range(int(weight))]
    return [mean + offset for mean, offset in zip(flat, offsets)]


def _size(node: Node) -> tuple[float, float]:
    shown = _shown(node)
    widest = max(len(shown[0]) * CHARACTER * 1.2, *(len(text) * CHARACTER * 0.95 for text in shown[1:]), 40.0)
    return round(widest + 26, 1), 18.0 + 17.0 * len(shown)


def _shown(node: Node) -> list[str]:
    return [short(text, 28) for text in node.lines if text] or [short(node.id, 28)]


def _box(node: Node, box: Box) -> str:
    radius = 16 if node.kind == "finding" else 6
    middle = round(box.x + box.width / 2, 1)
    rows = []
    for i, text in enumerate(_shown(node)):
        y = round(box.y + 22 + 17 * i, 1)
        kind = "title" if i == 0 else "sub"
        rows.append(f'<text class="{kind}" x="{middle}" y="{y}" text-anchor="middle">{escape(text)}</text>')
    full = escape("\n".join(node.lines))
    inside = (
        f'<title>{full}</title><rect x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="{radius}"/>'
        + "".join(rows)
    )
    body = f'<g class="node {escape(node.kind)}">{inside}</g>'
    return f'<a href="{escape(node.href)}">{body}</a>' if node.href.startswith("#") else body


def _curve(points: list[tuple[float, float]], across: bool) -> str:
    (x, y), *rest = points
    path = [f"M{x:.1f} {y:.1f}"]
    for nx, ny in rest:
        if abs(nx - x) < 0.05 or abs(ny - y) < 0.05:
            path.append(f"L{nx:.1f} {ny:.1f}")
        elif across:
            half = (x + nx) / 2
            path.append(f"C{half:.1f} {y:.1f} {half:.1f} {ny:.1f} {nx:.1f} {ny:.1f}")
        else:
            half = (y + ny) / 2
            path.append(f"C{x:.1f} {half:.1f} {nx:.1f} {half:.1f} {nx:.1f} {ny:.1f}")
        x, y = nx, ny
    return " ".join(path)


STYLE = """
.lineage{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;background:#fff}
.edge{fill:none;stroke:#a9b0b7;stroke-width:1.4}.tip{fill:#a9b0b7}
.node rect{fill:#f4f7f7;stroke:#2b6f6c;stroke-width:1.3}.node.source rect{fill:#fff;stroke:#8d959d;stroke-dasharray:4 3}
.node.finding rect{fill:#faf5ea;stroke:#a9822f}.title{font-size:13px;font-weight:600;fill:#1d2125}
.sub{font-size:11.5px;fill:#616970}
"""
