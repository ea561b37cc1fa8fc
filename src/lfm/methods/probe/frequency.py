"""Whether fine-tuning on facts taught a model which objects are frequent, in place of which are right.

    over(n) = times that objects trained on n times were named / times that they are right
    shock   = ½ Σₒ |named(o) − right(o)|, shares of a relation's facts;   range shock = named(seen) − right(seen)

Paper: Understanding Finetuning for Factual Knowledge Extraction, arXiv 2301.11293: after fine-tuning a model names
objects of the training set too often, rare ones above all, and common ones that are not in it too seldom; beyond a
point that costs more than fine-tuning gains. The two numbers are ours: shock is the total variation between what is
named and what is right, whatever the cause; range shock the share of answers that are objects seen in training, over
the share of facts of which that is right. Give the model before as `base`: only what it did not show already is fine-
tuning's.

The paper's cures are to mix fine-tuning with the first task (train on the facts and running text together) and to mix
the models: the curve "accuracy of the mixture" has (1 − λ) p_base + λ p over each fact's candidates; choose λ on facts
that you do not report.

Models: those that tell log-probabilities. Data: `train`, the facts that were fine-tuned on; `facts`, others of the same
relations. A relation's candidates are its objects in both, less what is also true of the subject. The finding has a row
a relation, and each object's counts as evidence. Errors: DataError where the two share no relation, or all facts.

    lfm run probe.frequency model=tuned base=base train=train.jsonl facts=held-out.jsonl --out shock
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import exp, inf
from typing import Annotated, Any

import lfm.core
from lfm.core import Cost, Curve, Data, DataSlot, Finding, Inputs, Logprobs, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import DataError
from lfm.data import facts as cloze
from lfm.data.facts import Question
from lfm.data.records import Fact

CHUNK = 256
"""Answers asked for in one journalled step."""
FEW = 20
"""Candidates a relation is taken to have where a plan is made before the data are read."""


class Config(lfm.core.Config, frozen=True):
    points: Annotated[int, Meta(ge=2, description="mixtures of the two models, both ends counted")] = 11


def run(config: Config, inputs: Inputs, run: Run) -> Finding:
    train: list[Fact] = list(inputs.records("train"))
    facts = _held_out(train, inputs.records("facts"))
    questions = cloze.questions([*train, *facts])[len(train) :]
    after = _told("model", inputs.model("model"), questions, run)
    before = _told("base", inputs.model("base"), questions, run) if inputs.all("base") else None
    return _finding(config, train, facts, questions, after, before)


def _held_out(train: Sequence[Fact], facts: Sequence[Fact]) -> list[Fact]:
    """The facts of relations that were trained on, which were not."""
    taught = {(fact.subject, fact.relation, fact.object) for fact in train}
    relations = {fact.relation for fact in train}
    return [f for f in facts if f.relation in relations and (f.subject, f.relation, f.object) not in taught]


def _told(name: str, model: Model, questions: Sequence[Question], run: Run) -> list[tuple[float, ...]]:
    """Each question's candidates' probabilities among themselves."""
    logprobs, every = model.ask(Logprobs), cloze.pairs(questions)
    told: dict[Any, float] = {}
    starts = range(0, len(every), CHUNK)
    for start in run.track(starts, f"facts, {name}", len(starts)):
        part = every[start : start + CHUNK]
        told |= zip(part, run.step(f"{name} {start}", lambda part=part: cloze.score(logprobs, part)), strict=True)
    return [shares(scores) for scores in cloze.regrouped(questions, told)]


def shares(scores: Sequence[float]) -> tuple[float, ...]:
    """The probabilities among candidates of these log-probabilities; equal where all are impossible."""
    top = max(scores)
    odds = [1.0 if top == -inf else exp(score - top) for score in scores]
    return tuple(odd / sum(odds) for odd in odds)


def shock(named: Counter[str], right: Counter[str]) -> float:
    """The total variation between two distributions of the same number of answers."""
    return sum(abs(named[o] - right[o]) for o in named.keys() | right.keys()) / (2 * max(1, right.total()))


def range_shock(named: Counter[str], right: Counter[str], trained: Counter[str]) -> float:
    """How much more of the answers than of the facts are objects that were trained on."""
    return sum((named[o] - right[o]) for o in named.keys() | right.keys() if trained[o]) / max(1, right.total())


def _finding(
    config: Config,
    train: Sequence[Fact],
    facts: Sequence[Fact],
    questions: Sequence[Question],
    after: Sequence[tuple[float, ...]],
    before: Sequence[tuple[float, ...]] | None,
) -> Finding:
    models = {"": after} | ({"base_": before} if before else {})
    said = {name: [q.candidates[cloze.best(p)] for q, p in zip(questions, told)] for name, told in models.items()}
    rows, evidence = [], []
    for relation in sorted({fact.relation for fact in facts}):
        places = [i for i, fact in enumerate(facts) if fact.relation == relation]
        trained = Counter(fact.object for fact in train if fact.relation == relation)
        right = Counter(facts[i].object for i in places)
        row: dict[str, Any] = {"relation": relation, "facts": len(places), "trained": trained.total()}
        named = {name: Counter(told[i] for i in places) for name, told in said.items()}
        for name, told in said.items():
            hits = {i: told[i] == facts[i].object for i in places}
            unseen = [hit for i, hit in hits.items() if not trained[facts[i].object]]
            row[f"{name}accuracy"] = sum(hits.values()) / len(hits)
            row[f"{name}accuracy_unseen"] = sum(unseen) / len(unseen) if unseen else None
            row[f"{name}shock"] = shock(named[name], right)
            row[f"{name}range_shock"] = range_shock(named[name], right, trained)
        rows.append(row)
        for o in sorted(trained.keys() | right.keys() | named[""].keys()):
            counts = {f"{name}named": times[o] for name, times in named.items()}
            evidence.append({"relation": relation, "object": o, "trained": trained[o], "right": right[o], **counts})
    measured = [name for name in rows[0] if name not in ("relation", "facts", "trained")]
    held = {name: [row[name] for row in rows if row[name] is not None] for name in measured}
    metrics = {name: sum(values) / len(values) for name, values in held.items() if values}
    curves = [_over(evidence, name) for name in models]
    if before:
        curves.append(_mixed(config.points, facts, questions, after, before))
    more = f" ({metrics['base_shock']:.2f} before)" if before else ""
    return Finding(
        title=f"Shock {metrics['shock']:.2f}{more} over {len(facts)} facts in {len(rows)} relations",
        columns=tuple(rows[0]),
        rows=tuple(rows),
        metrics={**metrics, "facts": float(len(facts)), "relations": float(len(rows))},
        evidence=tuple(evidence),
        curves=tuple(curves),
    )


def _over(evidence: Sequence[dict[str, Any]], name: str) -> Curve:
    """Named over right, by how often an object was trained on; levels of which nothing is right are left out."""
    named, right = Counter[int](), Counter[int]()
    for each in evidence:
        named[each["trained"]] += each[f"{name}named"]
        right[each["trained"]] += each["right"]
    levels = sorted(level for level, count in right.items() if count)
    return Curve(
        name="named over right" + (", before" if name else ""),
        x=tuple(map(float, levels)),
        y=tuple(named[level] / right[level] for level in levels),
        x_label="times in training",
        y_label="named / right",
    )


def _mixed(
    points: int,
    facts: Sequence[Fact],
    questions: Sequence[Question],
    after: Sequence[tuple[float, ...]],
    before: Sequence[tuple[float, ...]],
) -> Curve:
    weights = [i / (points - 1) for i in range(points)]

    def accuracy(weight: float) -> float:
        mixed = [[(1 - weight) * a + weight * b for a, b in zip(*pair)] for pair in zip(before, after)]
        hits = [q.candidates[cloze.best(p)] == fact.object for q, p, fact in zip(questions, mixed, facts)]
        return sum(hits) / len(hits)

    return Curve(
        name="accuracy of the mixture",
        x=tuple(weights),
        y=tuple(map(accuracy, weights)),
        x_label="λ (0: before, 1: after)",
        y_label="accuracy",
    )


def agree(config: Config, inputs: Inputs) -> None:
    train, facts = inputs.records("train"), inputs.records("facts")
    if not {fact.relation for fact in train} & {fact.relation for fact in facts}:
        names = ", ".join(sorted({fact.relation for fact in train})[:5])
        raise DataError("no fact is of a relation that was trained on", why=f"those are {names}")
    if not _held_out(train, facts):
        raise DataError("all facts were trained on", fix="give others of the same relations")


def cost(config: Config, sizes: Sizes) -> Cost:
    """Each prompt once a candidate and model."""
    records, tokens = sizes.data["facts"]
    models = [model for role in ("model", "base") for model in sizes.models.get(role, ())]
    times = min(FEW, records)
    return Cost(
        flops=sum(2.0 * model.parameters * tokens * times for model in models),
        steps=len(models) * -(-records * times // CHUNK),
        memory=max((4 * model.parameters for model in models), default=0),
        queries=len(models) * records * times,
        tokens=len(models) * tokens * times,
    )


METHOD = Method(
    paper="arXiv:2301.11293",
    config=Config,
    models={
        "model": Slot((Logprobs,), help="the model that was fine-tuned on facts"),
        "base": Slot((Logprobs,), min=0, help="the model before"),
    },
    data={
        "train": DataSlot(Data.LABELED, ("fact",), help="the facts that it was fine-tuned on"),
        "facts": DataSlot(Data.FEW_SHOT, ("fact",), help="others of the same relations"),
    },
    run=run,
    cost=cost,
    agree=agree,
    gives="finding",
)
