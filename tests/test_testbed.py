"""What the benchmarks of editing ask: of whom, and what must and must not change with it."""

from __future__ import annotations

import importlib.util
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from lfm.data.records import Fact


@pytest.fixture(scope="module")
def testbed() -> Any:
    path = Path(__file__).parents[1] / "benchmarks" / "testbed.py"
    spec = importlib.util.spec_from_file_location("testbed", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def known() -> list[Fact]:
    """Twelve people; the land is the town's, of which two lie in each."""
    towns = ("Rome", "Oslo", "Lima", "Cairo")
    lands = dict(zip(towns, ("east", "west", "east", "west"), strict=True))
    jobs = ("baker", "pilot", "nurse")
    made = []
    for i, (town, job) in enumerate(product(towns, jobs)):
        name = f"Person{i}"
        for relation, object_ in (("town", town), ("land", lands[town]), ("job", job)):
            made.append(Fact(subject=name, relation=relation, object=object_, prompt=f"The {relation} of {name} is"))
    return made


def test_what_follows_is_found_in_the_facts(testbed: Any) -> None:
    assert testbed.following(known()) == {
        "town": {"land": {"Rome": "east", "Oslo": "west", "Lima": "east", "Cairo": "west"}}
    }


def test_everybody_has_one_edit_before_anybody_has_two(testbed: Any) -> None:
    assert len({edit.subject for edit in testbed.moved(known(), 12, seed=3)}) == 12
    assert len({edit.subject for edit in testbed.moved(known(), 5, seed=3)}) == 5


def test_fewer_edits_of_a_seed_are_the_first_of_more(testbed: Any) -> None:
    def asked(count: int) -> list[tuple[str, str]]:
        return [(edit.prompt, edit.new_object) for edit in testbed.moved(known(), count, seed=4)]

    assert asked(14)[:6] == asked(6)


@pytest.mark.parametrize("seed", range(5))
def test_neighbours_stay_true_and_what_follows_is_of_the_new_object(testbed: Any, seed: int) -> None:
    facts = known()
    follows = testbed.following(facts)["town"]["land"]
    edits = testbed.moved(facts, 20, seed)
    edited = {edit.prompt for edit in edits}
    edited |= {f"The land of {edit.subject} is" for edit in edits if edit.relation == "town"}
    for edit in edits:
        assert edit.relation != "land" and edit.new_object != edit.object
        for prompt, answer in edit.neighbours:
            assert prompt not in edited
            assert (prompt, answer) in {(fact.prompt, fact.object) for fact in facts}
        for prompt, answer in edit.portability:
            assert prompt == f"The land of {edit.subject} is"
            assert answer == follows[edit.new_object] != follows[edit.object]


def test_more_edits_than_facts_are_refused(testbed: Any) -> None:
    with pytest.raises(SystemExit, match="25 edits were asked for, and there are 24 facts"):
        testbed.moved(known(), 25, seed=0)
