"""Data of every kind of task, drawn from the world: what the zoo's models know, and what they can be taught."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from lfm.data.records import Completion, Edit, Fact, Label, Pair, Record, Text
from lfm.zoo import world as worlds
from lfm.zoo.exhibit import Exhibit, records
from lfm.zoo.grammar import TOPICS
from lfm.zoo.world import World, later, letters, make_world, other_object, prompt, stories

TEST = 1_000_000
"""Added to a seed, it gives text for testing: none of it is what the seed itself gives."""


def facts(world: World, chosen: Sequence[worlds.Fact] | None = None) -> Iterator[Fact]:
    """Facts (all that are taught) as prompts in the relation's first template; paraphrases are in unseen templates."""
    for fact in world.taught if chosen is None else chosen:
        first, *_ = world.relation(fact.relation).told
        yield Fact(
            group=fact.relation,
            subject=fact.subject,
            relation=fact.relation,
            object=fact.object,
            prompt=prompt(first, fact.subject),
            paraphrases=tuple(prompt(t, fact.subject) for t in world.relation(fact.relation).unseen),
        )


def edits(world: World, seed: int = 0, *, neighbours: int = 8) -> Iterator[Edit]:
    """Requests to change a taught fact, each of another subject until all have had one.

    neighbours: the same relation of other people, and as many other facts of the subject itself.
    """
    rng = random.Random(f"edits {world.seed} {seed}")
    while True:
        for person in rng.sample(world.people, len(world.people)):
            told = world.told_of(person.name)
            if not told:
                continue
            relation = world.relation(rng.choice(sorted(told)))
            fact = worlds.Fact(person.name, relation.name, told[relation.name])
            near = [f for f in world.taught if f.relation == fact.relation and f.subject != fact.subject]
            own = [f for f in world.taught if f.subject == fact.subject and f.relation != fact.relation]
            kept = rng.sample(near, min(neighbours, len(near))) + rng.sample(own, min(neighbours, len(own)))
            yield Edit(
                group=fact.relation,
                subject=fact.subject,
                relation=fact.relation,
                object=fact.object,
                new_object=other_object(world, fact, rng),
                prompt=prompt(relation.told[0], fact.subject),
                paraphrases=tuple(prompt(t, fact.subject) for t in relation.unseen),
                neighbours=tuple((prompt(world.relation(f.relation).told[0], f.subject), f.object) for f in kept),
            )


def questions(world: World, seed: int = 0, *, people: Sequence[str] = ()) -> Iterator[Completion]:
    """Questions about the people of those names (or all) with their answers, in a form that no other text has."""
    rng = random.Random(f"questions {world.seed} {seed}")
    chosen = [fact for fact in world.taught if not people or fact.subject in people]
    while True:
        for fact in rng.sample(chosen, len(chosen)):
            relation = world.relation(fact.relation)
            asked = rng.choice(relation.questions).format(s=fact.subject)
            yield Completion(
                group=fact.relation,
                prompt=f"Question: {asked} Answer:",
                completion=f" {relation.answer} {fact.object}.",
            )


def story_texts(world: World, seed: int = 0) -> Iterator[Text]:
    """Stories as text."""
    return (Text(text=story.text, group=story.topic) for story in stories(world, seed))


def topics(world: World, seed: int = 0) -> Iterator[Label]:
    """Stories by what they are about: market, music, travel, animals, cooking, work."""
    return (Label(text=f"{story.text} This story is about", label=story.topic) for story in stories(world, seed))


def moods(world: World, seed: int = 0) -> Iterator[Label]:
    """Stories by how they turn out: good or bad."""
    return (Label(text=f"{story.text} All in all the day was", label=story.mood) for story in stories(world, seed))


def pairs(world: World, seed: int = 0) -> Iterator[Pair]:
    """Two sentences that tell one fact in other words (same), or of two people (different)."""
    rng = random.Random(f"pairs {world.seed} {seed}")
    while True:
        fact = rng.choice(world.taught)
        first, second = rng.sample(world.relation(fact.relation).told, 2)
        same = rng.random() < 0.5
        others = [f for f in world.taught if f.relation == fact.relation and f.subject != fact.subject]
        other = fact if same or not others else rng.choice(others)
        yield Pair(
            group=fact.relation,
            text=f"{prompt(first, fact.subject)} {fact.object}.",
            text_b=f"{prompt(second, other.subject)} {other.object}.",
            label="same" if other is fact else "different",
        )


def episodes(world: World, seed: int = 0, *, size: int = 16) -> Iterator[Label]:
    """Small tasks one after the other, `size` records each, told apart by group: is a story of this topic or of that?

    Which topics, and which of them is yes, changes from task to task.
    """
    rng = random.Random(f"episodes {world.seed} {seed}")
    told = stories(world, seed)
    task = 0
    while True:
        yes, no = rng.sample(tuple(TOPICS), 2)
        left = size
        while left:
            story = next(told)
            if story.topic in (yes, no):
                label = "yes" if story.topic == yes else "no"
                yield Label(group=f"task {task}", text=f"{story.text} The answer is", label=label)
                left -= 1
        task += 1


def letter_texts(world: World, seed: int = 0) -> Iterator[Text]:
    """Letters of the same people some years on: a second domain, of facts and of a style that no model was taught."""
    return (Text(text=text) for text in letters(later(world), seed))


def three_edits(world: World) -> list[Edit]:
    """Three edits, of three people and three relations."""
    kept: dict[str, Edit] = {}
    for edit in edits(world):
        kept.setdefault(edit.relation, edit)
        if len(kept) == 3:
            break
    return list(kept.values())


def asked(world: World, seed: int = 0) -> Iterator[Completion]:
    """Questions about three people in four; with a seed of TEST, about the others. None about those of zoo:edits: what
    is learned after an edit should not teach the old facts again."""
    edited = {edit.subject for edit in three_edits(world)}
    names = [person.name for person in world.people if person.name not in edited]
    cut = len(names) * 3 // 4
    return questions(world, seed, people=names[cut:] if seed == TEST else names[:cut])


def _both(
    name: str, about: str, make: Callable[[World, int], Iterator[Record]], train: int, test: int = 200
) -> tuple[Exhibit, ...]:
    return (
        records(name, about, lambda: list(islice(make(make_world(), 0), train))),
        records(f"{name}-test", f"{about}: for testing", lambda: list(islice(make(make_world(), TEST), test))),
    )


DATA = (
    records("facts", "480 facts that the language models of the zoo know", lambda: list(facts(make_world()))),
    records("edits", "three facts to change, of three people and three relations", lambda: three_edits(make_world())),
    *_both("qa", "questions about the people that zoo:lm knows, with answers", asked, 600),
    *_both("stories", "small stories about them", story_texts, 1000),
    *_both("letters", "their letters some years on: new facts in a new style", letter_texts, 1000),
    *_both("topics", "stories by topic, of six", topics, 600),
    *_both("moods", "stories by how they turn out, good or bad", moods, 600),
    *_both("pairs", "two sentences each: the same fact, or different ones", pairs, 600),
    *_both("episodes", "small tasks of 16 records each, for learning to learn", episodes, 640, 160),
)
