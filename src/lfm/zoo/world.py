"""A small world of people and facts, made by seed, with text about it in any amount.

The world is what the zoo's language models know. Everything that a test or an evaluation asks of them (what was taught,
what was held out, how a fact can be said otherwise, whose facts must not change with an edit) is read from here.
No torch: `random.Random` keyed by the seed, so one seed gives one world and one text on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from lfm.zoo.grammar import Relation


@dataclass(frozen=True)
class Person:
    """Somebody of the world: `name` is two words, `she` chooses the pronoun."""

    name: str
    she: bool


@dataclass(frozen=True)
class Fact:
    """One fact: `subject` stands in `relation` to `object`, each by name."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class World:
    """People, relations and one fact for each pair of them; `held_out` are true but told by no text.

    Text that the generators below make states only `taught` facts, so a model's score on `held_out` is what guessing gives.
    """

    seed: int
    people: tuple[Person, ...]
    relations: tuple[Relation, ...]
    taught: tuple[Fact, ...]
    held_out: tuple[Fact, ...] = ()
