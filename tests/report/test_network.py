"""The picture of a graph of facts: all in it, inside its frame."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.core.finding import Edge, Graph
from lfm.report import network

NAMES = st.text("ab<&\"' é", min_size=1, max_size=30)
EDGES = st.builds(Edge, subject=NAMES, relation=NAMES, object=NAMES, confidence=st.floats(0, 1))


@given(st.lists(EDGES, max_size=30))
@settings(max_examples=30)
def test_every_fact_is_drawn_once_inside_the_frame(edges: list[Edge]) -> None:
    picture = network.draw(Graph(name="what is known", edges=tuple(edges)))
    if not edges:
        assert picture == ""
        return
    root = ElementTree.fromstring(picture)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    drawn = list(root)
    assert sum(each.tag == "line" for each in drawn) == len(edges)
    assert sum(each.tag == "circle" for each in drawn) == len({n for e in edges for n in (e.subject, e.object)})
    for each in drawn:
        across = [float(v) for k, v in each.attrib.items() if k in ("x", "x1", "x2", "cx")]
        down = [float(v) for k, v in each.attrib.items() if k in ("y", "y1", "y2", "cy")]
        assert all(0 <= x <= width for x in across) and all(0 <= y <= height for y in down)


def test_of_many_those_with_the_most_facts_are_drawn_and_it_says_so() -> None:
    hub = [Edge(subject="hub", relation="r", object=f"o{i}") for i in range(network.NODES)]
    far = [Edge(subject=f"s{i}", relation="r", object=f"t{i}") for i in range(40)]
    picture = network.draw(Graph(name="g", edges=(*far, *hub)))
    assert ">r<" not in picture and ">r<" in network.draw(Graph(name="g", edges=tuple(hub[:3])))
    assert ">hub<" in picture and picture.count("<circle") == network.NODES
    assert f"the {network.NODES} of {1 + network.NODES + 80} that have the most are drawn" in picture
