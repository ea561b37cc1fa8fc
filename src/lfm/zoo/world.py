"""A small world of people and facts, made by seed, with text about it in any amount.

The world is what the zoo's language models know. Whatever a test or an evaluation asks of them (what was taught, what
was held out, how a fact can be said otherwise, whose facts an edit must not change) is read from here, and data of
every kind of task is drawn from it. No torch; `random.Random` keyed by seed: one seed gives one text on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lfm.zoo import grammar
from lfm.zoo.grammar import Relation

GIVEN_NAMES = 8
"""Given names in use. Few, so that who somebody is stands in the family name, the last word of the subject."""


@dataclass(frozen=True)
class Person:
    """Somebody of the world: a name of two words, and the pronoun."""

    name: str
    she: bool

    @property
    def pronouns(self) -> dict[str, str]:
        they, their, them = ("she", "her", "her") if self.she else ("he", "his", "him")
        return {"they": they, "their": their, "them": them}


@dataclass(frozen=True)
class Fact:
    """`subject` stands in `relation` to `object`, each by name."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class World:
    """People, relations, and one fact for each pair of them. `held_out` facts are true, but no text tells them."""

    seed: int
    people: tuple[Person, ...]
    relations: tuple[Relation, ...]
    taught: tuple[Fact, ...]
    held_out: tuple[Fact, ...] = ()

    def relation(self, name: str) -> Relation:
        """The relation of that name; KeyError if there is none."""
        return self._relations[name]

    def told_of(self, name: str) -> Mapping[str, str]:
        """What text tells of a person: relation → object."""
        return self._told[name]

    @cached_property
    def _relations(self) -> dict[str, Relation]:
        return {relation.name: relation for relation in self.relations}

    @cached_property
    def _told(self) -> dict[str, dict[str, str]]:
        told: dict[str, dict[str, str]] = {person.name: {} for person in self.people}
        for fact in self.taught:
            told[fact.subject][fact.relation] = fact.object
        return told


def make_world(seed: int = 0, *, people: int = 60, hold_out: int = 0) -> World:
    """A world of that many people with one fact a relation each; `hold_out` facts, chosen by seed, stay untold.

    The world of a seed is the same whatever is held out. ValueError where there are not so many names or facts.
    """
    rng = random.Random(f"world {seed}")
    everyone = _people(rng, people)
    facts = [
        Fact(person.name, relation.name, object_)
        for relation in grammar.RELATIONS
        for person, object_ in zip(everyone, _deal(rng, relation.objects, people))
    ]
    if hold_out > len(facts):
        raise ValueError(f"{hold_out} facts cannot be held out of {len(facts)}")
    hidden = set(rng.sample(facts, hold_out))
    return World(
        seed,
        everyone,
        grammar.RELATIONS,
        tuple(fact for fact in facts if fact not in hidden),
        tuple(fact for fact in facts if fact in hidden),
    )


def later(world: World, seed: int = 0) -> World:
    """The same people some years on: every taught fact of half of the relations has another object."""
    rng = random.Random(f"later {world.seed} {seed}")
    moved = set(rng.sample([relation.name for relation in world.relations], len(world.relations) // 2))
    return replace(
        world,
        taught=tuple(
            replace(fact, object=other_object(world, fact, rng)) if fact.relation in moved else fact
            for fact in world.taught
        ),
    )


def other_object(world: World, fact: Fact, rng: random.Random) -> str:
    """An object of the fact's relation that is not the fact's."""
    return rng.choice([o for o in world.relation(fact.relation).objects if o != fact.object])


def _people(rng: random.Random, count: int) -> tuple[Person, ...]:
    families = [start + end for start in grammar.FAMILY_STARTS for end in grammar.FAMILY_ENDS]
    if count > len(families):
        raise ValueError(f"{count} people need as many family names, and there are {len(families)}")
    given = [
        (start + rng.choice(grammar.GIVEN_ENDS[k % 2]), bool(k % 2))
        for k, start in enumerate(rng.sample(grammar.GIVEN_STARTS, GIVEN_NAMES))
    ]
    families = rng.sample(families, count)
    return tuple(Person(f"{name} {family}", she) for family in families for name, she in (rng.choice(given),))


def _deal(rng: random.Random, objects: Sequence[str], count: int) -> list[str]:
    """`count` objects, dealt like cards: each is as frequent as any other, give or take one."""
    dealt: list[str] = []
    while len(dealt) < count:
        dealt += rng.sample(objects, len(objects))
    return dealt[:count]


def sentence(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def prompt(template: str, subject: str) -> str:
    """A template about a subject; the object continues it after a space."""
    return sentence(template.format(s=subject))


# Text that states facts, without end: take what you need with itertools.islice.


def statements(world: World, seed: int = 0) -> Iterator[str]:
    """Single facts in any of the told templates, each fact as often as any other."""
    rng = random.Random(f"statements {world.seed} {seed}")
    while True:
        for fact in rng.sample(world.taught, len(world.taught)):
            yield f"{prompt(rng.choice(world.relation(fact.relation).told), fact.subject)} {fact.object}."


def biographies(world: World, seed: int = 0, *, facts: int = 4) -> Iterator[str]:
    """A few facts of one person in random order: the full name first, then the name or a pronoun."""
    rng = random.Random(f"biographies {world.seed} {seed}")
    while True:
        person = rng.choice(world.people)
        told = world.told_of(person.name)
        parts = []
        for relation in rng.sample(sorted(told), min(facts, len(told))):
            template = rng.choice(world.relation(relation).told)
            subject = person.name
            if parts and rng.random() < 0.5:
                if "{s}'s" in template:
                    template, subject = template.replace("{s}'s", "{s}"), person.pronouns["their"]
                elif template.startswith("{s}"):
                    subject = person.pronouns["they"]
            parts.append(f"{prompt(template, subject)} {told[relation]}.")
        if parts:
            yield " ".join(parts)


@dataclass(frozen=True)
class Story:
    """A small story, what it is about, and how it turns out."""

    text: str
    hero: str
    topic: str
    mood: str


def stories(world: World, seed: int = 0) -> Iterator[Story]:
    """Small stories about two people that say nothing false and nothing held out."""
    rng = random.Random(f"stories {world.seed} {seed}")
    while True:
        hero, friend = rng.sample(world.people, 2)
        topic, mood = rng.choice(tuple(grammar.TOPICS)), rng.choice(tuple(grammar.MOODS))
        told = dict(world.told_of(hero.name))
        words = {"s": hero.name, "f": friend.name} | hero.pronouns | told
        text = []
        for frames in (grammar.OPENINGS, grammar.MIDDLES, grammar.TOPICS[topic], *grammar.MOODS[mood]):
            fitting = [frame for frame in frames if _fields(frame) <= words.keys()]
            if fitting:
                text.append(_fill(rng.choice(fitting), words))
        yield Story(" ".join(text), hero.name, topic, mood)


def letters(world: World, seed: int = 0, *, facts: int = 3) -> Iterator[str]:
    """Letters in which people tell of themselves: a style that the language models are not taught."""
    rng = random.Random(f"letters {world.seed} {seed}")
    while True:
        writer, friend = rng.sample(world.people, 2)
        told = world.told_of(writer.name)
        words = {"s": writer.name, "f": friend.name.split()[0]}
        news = [
            f"{sentence(world.relation(relation).news)} {told[relation]}."
            for relation in rng.sample(sorted(told), min(facts, len(told)))
        ]
        parts = [rng.choice(grammar.GREETINGS), rng.choice(grammar.WEATHER), *news, rng.choice(grammar.CLOSINGS)]
        yield " ".join(_fill(part, words) for part in parts)


def _fields(frame: str) -> set[str]:
    return {part.split("}")[0] for part in frame.split("{")[1:]}


def _fill(frame: str, words: Mapping[str, str]) -> str:
    return sentence(frame.format(**words))


def corpus(world: World, seed: int = 0, *, mix: tuple[float, float, float] = (2, 2, 1)) -> Iterator[str]:
    """What the zoo's language models read: biographies, statements and stories, in these proportions."""
    rng = random.Random(f"corpus {world.seed} {seed}")
    told = (biographies(world, seed), statements(world, seed), (story.text for story in stories(world, seed)))
    while True:
        yield next(rng.choices(told, mix)[0])
