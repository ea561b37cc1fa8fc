"""What a language model knows, drawn: from seeds along relations to their objects, and on from those.

    confidence(s, r, o) = share of the answers about (s, r) that name o;    kept where it is at least `keep`

Every (subject, relation) is asked in several wordings, each once greedily and `samples` times at `temperature`: what a
model knows it says again, what it makes up it makes up anew. What was kept is a subject in its turn, to `depth`.

Paper: Crawling the Internal Knowledge-Base of Language Models (LMCRAWL), arXiv 2301.12810. With `relations=asked`, its
way, the model names the relations of a subject, and their objects, after examples made of the facts given; examples
that it answers wrongly by itself are shown with "Don't know", so that it may say so too. `relations=given` is for
models that follow no examples: relations are those of the facts given, worded as their prompts and paraphrases are, and
asked only of subjects of a kind (those that share a relation) with theirs. What differs: confidence by repeated
sampling, where the paper pools the answers of paraphrases; wordings are those of the data (asked: examples in another
order), and are not paraphrased by the model; subjects are called one thing only.

Models: any that gives text. Data: facts, for the relations' words, the seeds (`seeds=` for others), and the examples.
Where they tell what is asked they measure precision, the share of what was kept that they say too, and recall, that of
them (about subjects that were asked) that was kept; facts shown as examples count in neither. The finding has a row a
fact kept, every answer as evidence, a graph, and writes facts.jsonl, which probe.lama and editors take. Every prompt
sent counts as a query, samples too; beyond `queries` no further subject is asked.

    lfm run probe.crawl model=model facts=facts.jsonl --out crawled
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import lfm.core
from lfm.core import Cost, Curve, Data, DataSlot, Finding, Inputs, Meta, Method, Run, Sizes, Slot, Text
from lfm.core.finding import Edge, Graph
from lfm.data.crawling import Answered, Speaker, asked, given, tally
from lfm.data.records import Fact

LEVELS = 10
"""Points of the curve of precision over confidence."""
FEW = 10
"""Relations that a subject is taken to have where a plan is made before the data are read."""


class Config(lfm.core.Config, frozen=True):
    relations: Annotated[
        Literal["given", "asked"], Meta(description="those of the facts, or those that the model names")
    ] = "given"
    seeds: Annotated[tuple[str, ...], Meta(description="subjects to begin with; none: those of the facts")] = ()
    depth: Annotated[int, Meta(ge=1, description="steps from a seed")] = 2
    wordings: Annotated[int, Meta(ge=1, description="prompts that ask for the same, at most")] = 3
    samples: Annotated[int, Meta(ge=0, description="sampled answers to each, beside the greedy one")] = 4
    temperature: Annotated[float, Meta(gt=0, description="of the samples")] = 1.0
    keep: Annotated[float, Meta(gt=0, le=1, description="least confidence of what is kept")] = 0.5
    examples: Annotated[int, Meta(ge=1, description="asked: facts shown before a question")] = 8
    max_tokens: Annotated[int, Meta(ge=1, description="of an answer")] = 16
    queries: Annotated[int, Meta(ge=1, description="most prompts sent, samples counted")] = 20000


def run(config: Config, inputs: Inputs, run: Run) -> Finding:
    facts: list[Fact] = list(inputs.records("facts"))
    speaker = Speaker(config, inputs.model("model").ask(Text), run)
    asker = (
        given(facts, config.wordings)
        if config.relations == "given"
        else asked(facts, config.examples, config.wordings, speaker)
    )
    seeds = config.seeds or tuple(dict.fromkeys(fact.subject for fact in facts))
    waiting: deque[tuple[str, int, str | None]] = deque((seed, 1, None) for seed in seeds)
    met = set(seeds)
    found: list[Answered] = []
    left = 0
    while waiting:
        subject, depth, through = waiting.popleft()
        questions = asker.about(subject, through)
        if not questions:
            continue
        if not speaker.fits(len(questions)):
            left += 1
            continue
        more = tally(subject, depth, questions, speaker.answers(f"about {subject}", questions))
        found += more
        for each in more:
            if each.confidence >= config.keep and depth < config.depth and each.object not in met:
                met.add(each.object)
                waiting.append((each.object, depth + 1, each.relation))
    return _finding(config, facts, found, frozenset(asker.shown), speaker.used, left)


def _finding(
    config: Config, facts: Sequence[Fact], found: Sequence[Answered], shown: frozenset[Fact], used: int, left: int
) -> Finding:
    true: dict[tuple[str, str], set[str]] = {}
    for fact in facts:
        if fact not in shown:
            true.setdefault((fact.subject, fact.relation), set()).add(fact.object)
    kept = [each for each in found if each.confidence >= config.keep]
    met = {each.subject for each in found}
    told = sum(len(objects) for (subject, _), objects in true.items() if subject in met)

    def right(each: Answered) -> bool | None:
        known = true.get((each.subject, each.relation))
        return None if known is None else each.object in known

    def share(least: float) -> tuple[float, float] | None:
        """Precision and recall of what is at least so sure."""
        judged = [r for each in found if each.confidence >= least and (r := right(each)) is not None]
        return (sum(judged) / len(judged), sum(judged) / told) if judged else None

    metrics = {"facts": float(len(kept)), "subjects": float(len({e.subject for e in kept})), "queries": float(used)}
    metrics["subjects_not_asked"] = float(left)
    if measured := share(config.keep):
        metrics |= {"precision": measured[0], "recall": measured[1]}
    levels = [(i / LEVELS, s) for i in range(1, LEVELS + 1) if (s := share(i / LEVELS))]
    curves = [
        Curve(
            name=name,
            x=tuple(level for level, _ in levels),
            y=tuple(shares[i] for _, shares in levels),
            x_label="least confidence",
        )
        for i, name in enumerate(("precision", "recall"))
        if levels
    ]
    edges = [
        Edge(subject=e.subject, relation=e.relation, object=e.object, confidence=e.confidence, prompt=e.prompt)
        for e in kept
    ]
    rows = [
        {
            "subject": e.subject,
            "relation": e.relation,
            "object": e.object,
            "confidence": e.confidence,
            "depth": e.depth,
            "right": right(e),
        }
        for e in kept
    ]
    return Finding(
        title=f"{len(kept)} facts of {len({e.subject for e in kept})} subjects, by {used} prompts",
        columns=("subject", "relation", "object", "confidence", "depth", "right"),
        rows=tuple(rows),
        metrics=metrics,
        evidence=tuple({**each._asdict(), "right": right(each)} for each in found),
        curves=tuple(curves),
        graphs=(Graph(name="what the model says", edges=tuple(edges)),),
    )


def cost(config: Config, sizes: Sizes) -> Cost:
    """Of the seeds alone: what they lead to is not known before, but for `queries`, which is never passed."""
    records, tokens = sizes.data["facts"]
    subjects = len(config.seeds) or max(1, records // FEW)
    asked = min(config.queries, subjects * FEW * config.wordings * (1 + config.samples))
    long = tokens / max(1, records) * (1 if config.relations == "given" else 1 + config.examples) + config.max_tokens
    model = sizes.model("model")
    return Cost(
        flops=2.0 * model.parameters * asked * long,
        steps=int(subjects * (1 + config.samples) * config.max_tokens),
        memory=4 * model.parameters,
        queries=int(asked),
        tokens=int(asked * long),
    )


METHOD: Method[Any] = Method(
    paper="arXiv:2301.12810",
    config=Config,
    models={"model": Slot((Text,), help="the language model whose knowledge is crawled")},
    data={"facts": DataSlot(Data.FEW_SHOT, ("fact",), help="some facts: relations' wordings, seeds, examples")},
    run=run,
    cost=cost,
    gives="finding",
)
