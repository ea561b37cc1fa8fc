"""The lineage picture: nothing overlaps, nothing is left out, nothing escapes."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.report.lineage import Node, lay_out, svg


@st.composite
def dags(draw: st.DrawFn) -> tuple[list[Node], list[tuple[str, str]]]:
    count = draw(st.integers(1, 12))
    nodes = [Node(id=f"n{i}", lines=("x" * draw(st.integers(1, 40)), "method")) for i in range(count)]
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    edges = draw(st.lists(st.sampled_from(pairs), max_size=20)) if pairs else []
    return nodes, [(f"n{i}", f"n{j}") for i, j in edges]


@given(dags(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_boxes_lie_inside_and_apart_and_edges_run_through_none(graph, across: bool) -> None:
    nodes, edges = graph
    drawing = lay_out(nodes, edges, across=across)
    boxes = drawing.boxes
    assert set(boxes) == {node.id for node in nodes}
    assert set(drawing.paths) == set(edges)
    for name, a in boxes.items():
        assert a.x >= 0 and a.y >= 0 and a.x + a.width <= drawing.width and a.y + a.height <= drawing.height
        for other, b in boxes.items():
            if name < other:
                apart_x = a.x + a.width < b.x or b.x + b.width < a.x
                apart_y = a.y + a.height < b.y or b.y + b.height < a.y
                assert apart_x or apart_y, (name, other)
    for (start, end), points in drawing.paths.items():
        for (x0, y0), (x1, y1) in pairwise(points):
            along = (lambda t, a, b: a + (b - a) * t, lambda t, a, b: a + (b - a) * (3 * t * t - 2 * t**3))
            for step in range(1, 20):
                t = step / 20
                # the Bézier of _curve: depth runs as 1.5t(1-t)+t³, along the layer as 3t²-2t³
                deep = 1.5 * t * (1 - t) + t**3
                if across:
                    x, y = along[0](deep, x0, x1), along[1](t, y0, y1)
                else:
                    x, y = along[1](t, x0, x1), along[0](deep, y0, y1)
                for name, box in boxes.items():
                    if name not in (start, end):
                        inside = box.x < x < box.x + box.width and box.y < y < box.y + box.height
                        assert not inside, (start, end, name)


@given(dags())
@settings(max_examples=20, deadline=None)
def test_children_come_after_their_parents(graph) -> None:
    nodes, edges = graph
    boxes = lay_out(nodes, edges).boxes
    assert all(boxes[a].x + boxes[a].width < boxes[b].x for a, b in edges)


def test_the_same_graph_is_the_same_picture() -> None:
    nodes = [Node(id=i, lines=(i,)) for i in "abcd"]
    edges = [("a", "c"), ("b", "c"), ("c", "d"), ("a", "d")]
    assert svg(nodes, edges) == svg(nodes, edges)


def test_labels_are_escaped_and_the_file_is_xml() -> None:
    nodes = [Node(id="a", lines=("<script>alert(1)</script>", '"&')), Node(id="b", lines=("b",), kind='x"><x')]
    text = svg(nodes, [("a", "b")], alone=True)
    assert "<script" not in text
    root = ElementTree.fromstring(text)
    shown = "".join(root.itertext())
    assert "<script>" in shown and '"&' in shown


def test_only_places_in_the_page_are_linked() -> None:
    assert "href" not in svg([Node(id="a", lines=("a",), href="javascript:alert(1)")], [])
    assert 'href="#a"' in svg([Node(id="a", lines=("a",), href="#a")], [])


def test_a_circle_is_an_error() -> None:
    with pytest.raises(ValueError, match="no circles"):
        lay_out([Node(id="a", lines=("a",)), Node(id="b", lines=("b",))], [("a", "b"), ("b", "a")])


def test_an_empty_lineage_is_an_empty_picture() -> None:
    assert ElementTree.fromstring(svg([], [], alone=True)).tag.endswith("svg")
