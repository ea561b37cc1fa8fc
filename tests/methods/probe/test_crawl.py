"""probe.crawl: what is asked of whom, what answers count, and when it ends, of models whose knowledge is written."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

import tiny
from case import Case
from lfm import runs
from lfm.core import Inputs, Model, Text
from lfm.core.errors import ConfigError, DataError
from lfm.core.finding import Finding
from lfm.core.method import Amount, Sizes, check
from lfm.data.crawling import clean
from lfm.data.files import read, write
from lfm.data.records import Fact
from lfm.methods.probe import crawl
from lfm.models import load
from lfm.runs.run import LocalRun

WORLD = {
    ("Ada", "city"): "Rome",
    ("Bo", "city"): "Oslo",
    ("Cy", "city"): "Bern",
    ("Rome", "country"): "Italy",
    ("Oslo", "country"): "Norway",
    ("Bern", "country"): "Switzerland",
    ("Italy", "language"): "Italian",
}
WORDS = {
    "city": ("{s} lives in", "The home of {s} is in"),
    "country": ("{s} is a town of", "{s} lies in"),
    "language": ("In {s} they speak",),
}


def fact(subject: str, relation: str, object: str | None = None) -> Fact:
    first, *rest = (words.format(s=subject) for words in WORDS[relation])
    found = object or WORLD[subject, relation]
    return Fact(subject=subject, relation=relation, object=found, prompt=first, paraphrases=tuple(rest))


FACTS = (fact("Ada", "city"), fact("Rome", "country"), fact("Italy", "language"))


class Knows:
    """Says the world's objects; of what is not in it something else each time. Every prompt is remembered."""

    def __init__(self, world: dict[tuple[str, str], str]) -> None:
        self.world, self.prompts = world, []

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[str]:
        self.prompts += prompts
        return [self._said(prompt, random.Random(f"{prompt} {seed} {temperature}")) for prompt in prompts]

    def _said(self, prompt: str, chance: random.Random) -> str:
        if asked := re.search(r"Q: ([^\n#]*?) # ([^\n]*)\nA:$", prompt):
            return f" {self.world.get((asked[1], asked[2]), crawl_unknown(prompt, chance))}\n\nQ: more"
        if asked := re.search(r"Q: ([^\n#]*)\nA:$", prompt):
            return " " + " # ".join(r for s, r in self.world if s == asked[1]) + "\nand"
        for relation, words in WORDS.items():
            for template in words:
                if asked := re.fullmatch(re.escape(template).replace(r"\{s\}", "(.*)"), prompt):
                    return f" {self.world.get((asked[1], relation), chance.choice('abcdefgh'))}. It rains."
        return " so"


def crawl_unknown(prompt: str, chance: random.Random) -> str:
    return "Don't know" if "Don't know" in prompt else chance.choice("abcdefgh")


def crawled(work: Path, facts: Sequence[Fact] = FACTS, world=None, **settings) -> tuple[Finding, Knows]:
    knows = Knows(WORLD if world is None else world)
    model = Model(ref="known", kind="fake", gives={Text: lambda: knows}, identify=lambda: "known")
    inputs = check("probe.crawl", crawl.METHOD, Inputs({"model": (model,)}, {"facts": facts}))
    return crawl.run(crawl.Config(**settings), inputs, LocalRun(0, work)), knows


def triples(found: Finding) -> set[tuple[str, str, str]]:
    return {(row["subject"], row["relation"], row["object"]) for row in found.rows}


def case(here: Path) -> Case:
    tiny.causal(here / "model")
    write(FACTS[:2], here / "facts.jsonl")
    settings = {"samples": 1, "wordings": 2, "max_tokens": 4, "keep": 0.3}
    return Case({"model": ("model",)}, {"facts": "facts.jsonl"}, settings)


@pytest.mark.parametrize("relations", ["given", "asked"])
def test_from_one_seed_all_that_follows_is_found_and_nothing_else(relations: str, tmp_path: Path) -> None:
    """Bo and his town are in no example: the town is asked as a town is, the country as a country."""
    world = WORLD | {("Norway", "language"): "Norwegian"}
    found, _ = crawled(tmp_path, world=world, relations=relations, seeds=("Bo",), depth=3, examples=2)
    expected = {("Bo", "city", "Oslo"), ("Oslo", "country", "Norway"), ("Norway", "language", "Norwegian")}
    assert triples(found) == expected
    assert {row["depth"] for row in found.rows} == {1, 2, 3}
    assert all(row["confidence"] == 1.0 for row in found.rows)


def test_what_is_made_up_anew_each_time_is_not_kept(tmp_path: Path) -> None:
    found, _ = crawled(tmp_path, seeds=("Bo", "Nobody"), depth=1, keep=0.6, samples=9)
    assert triples(found) == {("Bo", "city", "Oslo")}
    made_up = [e for e in found.evidence if e["subject"] == "Nobody" and e["relation"] == "city"]
    assert sum(e["named"] for e in made_up) == made_up[0]["answers"] == 20  # two wordings, each greedy and nine times


def test_depth_and_a_subject_met_twice(tmp_path: Path) -> None:
    found, knows = crawled(tmp_path, world=WORLD | {("Cy", "city"): "Rome"}, seeds=("Ada", "Cy"), depth=2, samples=0)
    assert ("Rome", "country", "Italy") in triples(found) and ("Italy", "language", "Italian") not in triples(found)
    assert knows.prompts.count("Rome is a town of") == 1


@pytest.mark.parametrize(
    ("relations", "queries", "enough"),
    [("given", 1, False), ("given", 24, False), ("given", 25, True), ("asked", 5, False), ("asked", 20, False)],
)
def test_no_more_prompts_are_sent_than_allowed_and_all_are_counted(
    relations: str, queries: int, enough: bool, tmp_path: Path
) -> None:
    """25 in all with the relations given: five wordings, each greedy and four times."""
    found, knows = crawled(tmp_path, relations=relations, queries=queries, samples=4, examples=1)
    assert found.metrics["queries"] == len(knows.prompts)
    assert len(knows.prompts) <= queries
    assert (found.metrics["subjects_not_asked"] == 0) == enough


def test_examples_that_take_all_queries_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="spent on examples alone"):
        crawled(tmp_path, relations="asked", queries=4, samples=4, examples=1)


def test_precision_and_recall_are_by_the_facts_that_were_not_shown(tmp_path: Path) -> None:
    facts = [*FACTS, fact("Bo", "city", "Paris"), fact("Cy", "city")]
    found, _ = crawled(tmp_path, facts, depth=1)
    assert found.metrics["precision"] == pytest.approx(4 / 5) and found.metrics["recall"] == pytest.approx(4 / 5)
    shown, _ = crawled(tmp_path / "asked", facts, relations="asked", examples=5, depth=1, keep=0.9)
    assert "precision" not in shown.metrics


def test_what_it_gets_wrong_is_shown_as_not_known(tmp_path: Path) -> None:
    """The paper's way to let a model say so: without such an example it makes something up."""
    facts = [*FACTS, fact("Eve", "city", "Rome")]
    found, knows = crawled(tmp_path, facts, relations="asked", examples=4, depth=1)
    asked = [prompt for prompt in knows.prompts if prompt.endswith("Q: Ada # city\nA:")]
    assert any("Q: Eve # city\nA: Don't know\n" in prompt for prompt in asked)
    assert all("Don't know" not in row["object"] for row in found.rows)


def test_an_answer_ends_where_its_sentence_does() -> None:
    assert clean(" Rome. It rains", ".") == "Rome"
    assert clean("  New  York\nmore. ", "") == "New York"
    assert clean("", ".") == ""


def test_facts_that_do_not_name_their_subject_give_no_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no fact's prompt names its subject"):
        crawled(tmp_path, [Fact(subject="Ada", relation="city", object="Rome", prompt="She lives in")])


def test_the_graph_is_a_file_of_facts(tmp_path: Path) -> None:
    found, _ = crawled(tmp_path / "work", depth=3)
    found.save(tmp_path)
    kept = read(tmp_path / "facts.jsonl")
    assert {(f.subject, f.relation, f.object) for f in kept if isinstance(f, Fact)} == triples(found)
    assert Fact(subject="Rome", relation="country", object="Italy", prompt="Rome is a town of") in kept


def test_a_plan_counts_queries_and_never_more_than_allowed(tmp_path: Path) -> None:
    facts = load(tiny.causal(tmp_path / "m")).facts
    sizes = Sizes({"model": (facts,)}, {"facts": Amount(100, 1000)})
    assert crawl.cost(crawl.Config(queries=50), sizes).queries == 50
    assert crawl.cost(crawl.Config(samples=9), sizes).queries == 2 * crawl.cost(crawl.Config(samples=4), sizes).queries


@pytest.mark.slow
def test_what_the_zoos_model_was_taught_is_found(tmp_path: Path) -> None:
    facts = [f for f in runs.records("zoo:facts") if isinstance(f, Fact)]
    people = list(dict.fromkeys(f.subject for f in facts))[:6]
    inputs = Inputs({"model": (runs.model("zoo:lm"),)}, {"facts": facts})
    config = crawl.Config(seeds=tuple(people), samples=4)
    found = crawl.run(config, check("probe.crawl", crawl.METHOD, inputs), LocalRun(0, tmp_path))
    assert found.metrics["precision"] > 0.85
    assert found.metrics["recall"] > 0.85
