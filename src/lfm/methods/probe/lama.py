"""What a language model knows: where the right object of each fact ranks.

    rank(s, r, o) = 1 + |{c ≠ o : log p(c | prompt) ≥ log p(o | prompt)}|
    log p(c | prompt) = Σₜ log p(cₜ | prompt, c₁ … cₜ₋₁)      (masked models: over n masks at once)
    P@k = mean over relations of the mean over their facts of [rank ≤ k];    MRR likewise of 1 / rank

Paper: Language Models as Knowledge Bases? (LAMA), arXiv 1909.01066. There one-token objects compete with the whole
vocabulary; here, by default, objects of any length compete with the other objects of their relation in the data
(`candidates=vocabulary` is the paper's way, and leaves out objects of several tokens). An object that is also true of
the same subject does not compete; a tie counts against the right one. Causal models continue the prompt, masked ones
fill the blank before the suffix. `majority` is the P@1 of always naming a relation's commonest object: a model that
scores no more shows no knowledge of the subjects. Consistency is the share of agreeing pairs among a fact's prompt and
paraphrases (ParaRel, arXiv 2102.01017). ece: |confidence − accuracy| over 15 equal-width bins, confidence being
the top candidate's probability among its rivals.

Models: one that tells log-probabilities, an endpoint too. Data: facts. Log-probabilities are natural. Errors: DataError
where no object is one token and the whole vocabulary competes.

    lfm run probe.lama model=model facts=facts.jsonl --out known
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Annotated, Any, Literal

import lfm.core
from lfm.core import Cost, Curve, Data, DataSlot, Finding, Inputs, Logprobs, Meta, Method, Run, Sizes, Slot
from lfm.core.errors import DataError
from lfm.data import facts as cloze
from lfm.data.facts import Answer, Question
from lfm.data.records import Fact
from lfm.data.wording import spaced

CHUNK = 256
"""Answers asked for in one journalled step."""
BINS = 15
FEW = 20
"""Candidates a relation is taken to have where a plan is made before the data are read."""


class Config(lfm.core.Config, frozen=True):
    candidates: Annotated[
        Literal["objects", "vocabulary"], Meta(description="what competes: the relation's objects, or every token")
    ] = "objects"
    paraphrases: Annotated[int, Meta(ge=0, description="paraphrases asked of each fact, each at a prompt's cost")] = 3
    depth: Annotated[int, Meta(ge=1, description="places of the vocabulary's ranking looked at; an API tells few")] = (
        100
    )


def run(config: Config, inputs: Inputs, run: Run) -> Finding:
    facts: list[Fact] = list(inputs.records("facts"))
    logprobs = inputs.model("model").ask(Logprobs)
    whole = config.candidates == "vocabulary"
    given = len(facts)
    if whole:
        facts = _single(facts, logprobs, run)
    questions = cloze.questions(facts)
    asked, owners = [], []
    for i, (fact, question) in enumerate(zip(facts, questions)):
        for q in (question, *cloze.rephrased(fact, question)[: config.paraphrases]):
            asked.append(q)
            owners.append(i)
    answered = (_in_vocabulary if whole else _among_objects)(config, [facts[i] for i in owners], asked, logprobs, run)
    answers: list[list[Answer]] = [[] for _ in facts]
    for owner, answer in zip(owners, answered):
        answers[owner].append(answer)
    return _finding(config, facts, questions, answers, given)


def _among_objects(
    config: Config, facts: Sequence[Fact], asked: Sequence[Question], logprobs: Logprobs, run: Run
) -> list[Answer]:
    every = cloze.pairs(asked)
    told = dict(zip(every, _stepwise(every, "facts", lambda part: cloze.score(logprobs, part), run)))
    scores = cloze.regrouped(asked, told)
    return [cloze.among(q.candidates, s, f.object) for f, q, s in zip(facts, asked, scores)]


def _in_vocabulary(
    config: Config, facts: Sequence[Fact], asked: Sequence[Question], logprobs: Logprobs, run: Run
) -> list[Answer]:
    def top(part: Sequence[Question]) -> list[Any]:
        ranked = logprobs.top([q.prompt for q in part], config.depth, [q.suffix for q in part])
        return [[[token, value] for token, value in tokens] for tokens in ranked]

    also = cloze.true_objects(facts)
    ranked = _stepwise(asked, "facts", top, run)
    return [cloze.within(r, f.object, also[f.subject, f.relation]) for f, r in zip(facts, ranked)]


def _single(facts: Sequence[Fact], logprobs: Logprobs, run: Run) -> list[Fact]:
    """The facts whose object is one token where it stands."""

    def lengths(part: Sequence[Fact]) -> list[int]:
        prompts, answers = [f.prompt for f in part], [spaced(f.prompt, f.object) for f in part]
        return [len(s.logprobs) for s in logprobs.score(prompts, answers, [f.suffix for f in part])]

    kept = [f for f, n in zip(facts, _stepwise(facts, "objects", lengths, run)) if n == 1]
    if not kept:
        raise DataError(
            "no fact's object is one token of this model", fix="let the relation's objects compete: candidates=objects"
        )
    return kept


def _stepwise(items: Sequence[Any], label: str, ask: Callable[[Sequence[Any]], list[Any]], run: Run) -> list[Any]:
    """What is asked of the items, a chunk a step, so that an interrupted run pays for none twice."""
    found: list[Any] = []
    starts = range(0, len(items), CHUNK)
    for start in run.track(starts, label, len(starts)):
        found += run.step(f"{label} {start}", lambda start=start: ask(items[start : start + CHUNK]))
    return found


def _finding(
    config: Config,
    facts: Sequence[Fact],
    questions: Sequence[Question],
    answers: Sequence[Sequence[Answer]],
    given: int,
) -> Finding:
    relations = sorted({f.relation for f in facts})
    members = {r: [i for i, f in enumerate(facts) if f.relation == r] for r in relations}
    rows = [_row(config, relation, members[relation], facts, questions, answers) for relation in relations]
    names = ("p_at_1", "p_at_10", "mrr", "majority", "paraphrase_p_at_1", "consistency")
    held = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    metrics = {name: _mean(values) for name, values in held.items() if values}
    first = [a[0] for a in answers]
    bins = _bins(first)
    metrics["ece"] = sum(len(part) / len(first) * abs(_sure(part) - _right(part)) for part in bins)
    deepest = max(len(q.candidates) for q in questions) if config.candidates == "objects" else config.depth
    ks = range(1, min(deepest, 50) + 1)
    curve = [_mean([_mean([_hit(first[i], k) for i in members[r]]) for r in relations]) for k in ks]
    counts = {"facts": len(facts), "left_out": given - len(facts), "relations": len(relations)}
    return Finding(
        title=f"Knowledge of {len(facts)} facts in {len(relations)} relations",
        columns=tuple(rows[0]),
        rows=tuple(rows),
        metrics=metrics | {name: float(n) for name, n in counts.items()},
        evidence=tuple(_told(fact, *asked) for fact, asked in zip(facts, answers)),
        curves=(
            Curve(name="P@k", x=tuple(map(float, ks)), y=tuple(curve), x_label="k", y_label="P@k, mean over relations"),
            Curve(
                name="calibration",
                x=tuple(_sure(part) for part in bins),
                y=tuple(_right(part) for part in bins),
                x_label="confidence of the best candidate",
                y_label="share that is right",
            ),
        ),
    )


def _row(
    config: Config,
    relation: str,
    places: Sequence[int],
    facts: Sequence[Fact],
    questions: Sequence[Question],
    answers: Sequence[Sequence[Answer]],
) -> Mapping[str, Any]:
    first = [answers[i][0] for i in places]
    again = [a for i in places for a in answers[i][1:]]
    agreeing = [c for i in places if (c := _agreement([a.best for a in answers[i]])) is not None]
    commonest = Counter(facts[i].object for i in places).most_common(1)[0][1]
    rivals = {c for i in places for c in questions[i].candidates}
    return {
        "relation": relation,
        "facts": len(places),
        "candidates": len(rivals) if config.candidates == "objects" else None,
        "p_at_1": _mean([_hit(a, 1) for a in first]),
        "p_at_10": _mean([_hit(a, 10) for a in first]),
        "mrr": _mean([1 / a.rank if a.rank else 0.0 for a in first]),
        "majority": commonest / len(places),
        "paraphrase_p_at_1": _mean([_hit(a, 1) for a in again]) if again else None,
        "consistency": _mean(agreeing) if agreeing else None,
    }


def _told(fact: Fact, first: Answer, *again: Answer) -> Mapping[str, Any]:
    return {
        "subject": fact.subject,
        "relation": fact.relation,
        "object": fact.object,
        "prompt": fact.prompt,
        "answer": first.best,
        "rank": first.rank or None,
        "confidence": first.confidence,
        "probability": first.right,
        "paraphrased": [a.best for a in again],
    }


def _hit(answer: Answer, k: int) -> float:
    return float(0 < answer.rank <= k)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _agreement(said: Sequence[str]) -> float | None:
    """The share of pairs that agree; None of a single one."""
    pairs = len(said) * (len(said) - 1) // 2
    return sum(n * (n - 1) // 2 for n in Counter(said).values()) / pairs if pairs else None


def _bins(answers: Sequence[Answer]) -> list[list[Answer]]:
    """The answers by confidence in (b / 15, (b + 1) / 15], empty bins left out."""
    bins: list[list[Answer]] = [[] for _ in range(BINS)]
    for answer in answers:
        bins[min(BINS, max(1, ceil(answer.confidence * BINS))) - 1].append(answer)
    return [part for part in bins if part]


def _sure(part: Sequence[Answer]) -> float:
    return _mean([a.confidence for a in part])


def _right(part: Sequence[Answer]) -> float:
    return _mean([_hit(a, 1) for a in part])


def cost(config: Config, sizes: Sizes) -> Cost:
    """Each prompt once a candidate; how many candidates there are is guessed until the data are read."""
    records, tokens = sizes.data["facts"]
    prompts = 1 + config.paraphrases
    times = prompts * (min(records, FEW) if config.candidates == "objects" else 1)
    model = sizes.model("model")
    return Cost(
        flops=2.0 * model.parameters * tokens * times,
        steps=-(-records * times // CHUNK),
        memory=model.parameters * 4,
        queries=records * times,
        tokens=tokens * times,
    )


METHOD = Method(
    paper="arXiv 1909.01066",
    config=Config,
    models={"model": Slot((Logprobs,), help="the language model whose knowledge is measured")},
    data={"facts": DataSlot(Data.FEW_SHOT, ("fact",), help="facts with a prompt each; paraphrases are asked too")},
    run=run,
    cost=cost,
    gives="finding",
)
