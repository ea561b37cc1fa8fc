"""A graph of facts as a picture: what stands near what, laid out by springs."""

from __future__ import annotations

from html import escape

from lfm.core.finding import Edge, Graph
from lfm.report.words import short

WORDED = 30
"""Facts up to which each is told beside its line too."""
NODES = 60
"""Drawn at most: those with the most edges, and what joins them."""
WIDTH, MARGIN = 720.0, 60.0


def draw(graph: Graph) -> str:
    """The graph as SVG; "" if it has no edges. A fact is the fainter the less sure it is, and is told on hover."""
    import networkx

    whole = networkx.MultiDiGraph()
    for edge in graph.edges:
        whole.add_edge(edge.subject, edge.object)
    if not whole:
        return ""
    names = sorted(whole, key=lambda name: (-whole.degree(name), name))[:NODES]
    edges = [edge for edge in graph.edges if edge.subject in set(names) and edge.object in set(names)]
    shown = networkx.Graph()
    shown.add_nodes_from(names)
    shown.add_edges_from((edge.subject, edge.object) for edge in edges)
    places = networkx.spring_layout(shown, seed=0, k=2.5 / len(names) ** 0.5, iterations=100)
    height = min(640.0, 220 + 14.0 * len(names))
    low = [min(float(place[i]) for place in places.values()) for i in (0, 1)]
    wide = [max(float(place[i]) for place in places.values()) - low[i] for i in (0, 1)]

    def at(name: str, i: int) -> float:
        room = (WIDTH, height)[i] - 2 * MARGIN
        return MARGIN + (room / 2 if wide[i] < 1e-9 else room * (float(places[name][i]) - low[i]) / wide[i])

    worded = len(edges) <= WORDED
    lines = [
        _line(edge, (at(edge.subject, 0), at(edge.subject, 1)), (at(edge.object, 0), at(edge.object, 1)), worded)
        for edge in edges
    ]
    dots = [
        f'<circle class="dot after" cx="{at(name, 0):.1f}" cy="{at(name, 1):.1f}" r="3.5"/>'
        f'<text class="tick" x="{at(name, 0):.1f}" y="{at(name, 1) - 7:.1f}" text-anchor="middle">'
        f"{escape(short(name, 20))}</text>"
        for name in names
    ]
    left = "" if len(names) == len(whole) else f"; the {len(names)} of {len(whole)} that have the most are drawn"
    spoken = f"{graph.name}: {len(graph.edges)} facts{left}"
    return (
        f'<svg class="plot network" viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(spoken)}">'
        f"{''.join(lines)}{''.join(dots)}</svg>"
    )


def _line(edge: Edge, start: tuple[float, float], end: tuple[float, float], worded: bool) -> str:
    (x0, y0), (x1, y1) = start, end
    told = f"{edge.subject} – {edge.relation} → {edge.object} ({edge.confidence:.2f})"
    words = (
        f'<text class="axis" x="{(x0 + x1) / 2:.1f}" y="{(y0 + y1) / 2 - 2:.1f}" text-anchor="middle">'
        f"{escape(short(edge.relation, 20))}</text>"
    )
    return (
        f'<line class="link" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" '
        f'stroke-opacity="{0.25 + 0.75 * edge.confidence:.2f}"><title>{escape(told)}</title></line>'
        f"{words if worded else ''}"
    )
