"""Facts: where the right object ranks among its relation's objects, and whether the model says it unasked."""

from __future__ import annotations

from typing import cast

from lfm.core.heavy import np
from lfm.core.interfaces import Text
from lfm.data.answers import begins_with, room
from lfm.data.facts import best, log_probabilities, questions, rank
from lfm.data.records import Fact
from lfm.evals.estimate import grouped_mean, mean
from lfm.evals.setting import Found, Sample, Setting


def measure(setting: Setting) -> Found:
    """P@1, P@10 and MRR among the relation's objects, macro-averaged over relations; exact match of greedy text."""
    facts = [cast("Fact", r) for r in setting.records]
    relations = [f.relation for f in facts]
    found = Found()
    answers: list[str] = []
    if setting.access is not Text:
        asked = questions(facts)
        told = log_probabilities(setting.logprobs(), asked, done=setting.done)
        ranks = [rank(t, q.candidates.index(f.object)) for f, q, t in zip(facts, asked, told, strict=True)]
        answers = [q.candidates[best(t)] for q, t in zip(asked, told, strict=True)]
        few = min(len(q.candidates) for q in asked)
        basis = f"among each relation's objects ({few} at least), mean over {len(set(relations))} relations"
        places = np.array(ranks, dtype=np.float64)
        for name, values in {"p_at_1": places <= 1, "p_at_10": places <= 10, "mrr": 1 / places}.items():
            if setting.wants(name):
                found.measures.append(grouped_mean(name, values.astype(np.float64), relations, basis))
        if few == 1:
            found.notes.append("some relations have one object in the data: it wins against nothing")
    if setting.model.can(Text) and setting.wants("exact_match"):
        answers = setting.said([f.prompt for f in facts], min(room([f.object for f in facts]), 64))
        hits = [begins_with(s, f.object) for s, f in zip(answers, facts, strict=True)]
        found.measures.append(
            mean(
                "exact_match",
                np.array(hits, dtype=np.float64),
                "greedy text that begins with the object, as whole words",
            )
        )
    for fact, said in zip(facts[: setting.samples], answers, strict=False):
        found.samples.append(Sample(prompt=fact.prompt, answer=said, expected=fact.object))
    return found
