"""What editors are held against: facts that a model knows, each given another object, and whether it can be edited."""

from __future__ import annotations

import random
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from lfm.data.records import Edit, Fact, Text
from lfm.editing import batch, choose, setting, value
from lfm.editing.batch import Batched
from lfm.runs import refs
from lfm.runs.run import LocalRun

SURE = 0.9
"""The gate: p(new object) that the value of more than half of the edits reaches."""
GATED = 40
"""Edits whose values are searched for."""


def following(facts: list[Fact]) -> dict[str, dict[str, dict[str, str]]]:
    """relation → relation that follows from it → object → object, as the facts have it: one object is always with one
    other, and not the other way about."""
    of: dict[str, dict[str, str]] = defaultdict(dict)
    for fact in facts:
        of[fact.subject][fact.relation] = fact.object
    relations = sorted({fact.relation for fact in facts})
    pairs = {
        (a, b): {(told[a], told[b]) for told in of.values() if a in told and b in told}
        for a in relations
        for b in relations
        if a != b
    }
    single = {pair: len(seen) == len({one for one, _ in seen}) for pair, seen in pairs.items() if seen}
    found: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    for (a, b), alone in single.items():
        if alone and not single.get((b, a)):
            found[a][b] = dict(pairs[a, b])
    return dict(found)


def moved(facts: list[Fact], count: int, seed: int) -> list[Edit]:
    """Facts chosen by seed, each with another's object; of as many subjects as there are, before any has two. What
    follows from another is not edited but asked. Neighbours: two other people's same fact, and two other facts of the
    same person; none that is edited, or follows from it.
    """
    chance = random.Random(seed)
    follows = following(facts)
    derived = {b for each in follows.values() for b in each}
    shuffled = chance.sample(facts, len(facts))
    rounds: dict[str, int] = defaultdict(int)
    ranked: list[tuple[int, Fact]] = []
    for fact in shuffled:
        if fact.relation not in derived:
            ranked.append((rounds[fact.subject], fact))
            rounds[fact.subject] += 1
    if count > len(ranked):
        raise SystemExit(f"{count} edits were asked for, and there are {len(ranked)} facts to edit")
    chosen = [fact for _, fact in sorted(ranked, key=lambda each: each[0])[:count]]
    prompts = {(fact.subject, fact.relation): fact.prompt for fact in facts}
    edited = {fact.prompt for fact in chosen}
    edited |= {prompts.get((fact.subject, after), "") for fact in chosen for after in follows.get(fact.relation, {})}
    made = []
    for fact in chosen:
        objects = sorted({f.object for f in facts if f.relation == fact.relation} - {fact.object})
        new = chance.choice(objects)
        after = follows.get(fact.relation, {})
        same = [f for f in facts if f.relation == fact.relation and f.subject != fact.subject]
        own = [f for f in facts if f.subject == fact.subject and f.relation not in {fact.relation, *after}]
        beside = chance.sample(same, min(2, len(same))) + chance.sample(own, min(2, len(own)))
        made.append(
            Edit(
                subject=fact.subject,
                relation=fact.relation,
                object=fact.object,
                new_object=new,
                prompt=fact.prompt,
                paraphrases=fact.paraphrases,
                neighbours=tuple((f.prompt, f.object) for f in beside if f.prompt not in edited),
                portability=tuple(
                    (prompts[fact.subject, relation], then[new])
                    for relation, then in after.items()
                    if (fact.subject, relation) in prompts and then.get(new, then[fact.object]) != then[fact.object]
                ),
            )
        )
    return made


class Gate(NamedTuple):
    """said: share of the facts that the model says. probabilities: of the values, by block."""

    said: float
    probabilities: dict[int, list[float]]

    @property
    def block(self) -> int:
        """Where the values are surest in the median."""
        return max(self.probabilities, key=lambda block: statistics.median(self.probabilities[block]))

    def __str__(self) -> str:
        best = self.probabilities[self.block]
        sure, median = sum(p > SURE for p in best) / len(best), statistics.median(best)
        passed = "passes" if sure > 0.5 else "does NOT pass"
        return (
            f"the model says {self.said:.2f} of the facts; v* in block {self.block} reaches p {median:.3f} in the"
            f" median, p > {SURE:g} for {sure:.2f} of {len(best)} edits: it {passed} the gate"
        )


def gate(ref: str, facts: list[Fact], text: list[Text], settings: Batched) -> Gate:
    """What the best values say, whatever their change would do elsewhere; block by block."""
    edits = moved(facts, min(GATED, len({fact.subject for fact in facts})), seed=1000)
    model = refs.model(ref)
    with tempfile.TemporaryDirectory() as work:
        run = LocalRun(0, Path(work))
        here = setting.opened(model, text, run, prefixes=settings.prefixes, tokens=4096, token=settings.token)
        said = here.says([(edit.prompt, edit.object, edit.suffix) for edit in edits])
        site = batch.site_of(here)
        probabilities = {
            block: [
                found.probability
                for found in value.search_all(
                    here.module, block, [here.read(edit, block) for edit in edits], settings, (site,)
                )
            ]
            for block in choose.tried(here)
        }
    return Gate(sum(said) / len(said), probabilities)
