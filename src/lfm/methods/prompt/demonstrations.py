"""Choose which labelled examples stand before a text, and in which order.

    D* = argmax_{D ⊂ train, |D| = k, ordered}  score of P(c | D, x) over the dev records
    nearest: D(x) = the k of train with the highest cos(words(x), words(·)), the nearest last

Papers: order matters, and can be chosen by the entropy of what is told without labels (GlobalE), arXiv 2104.08786; the
nearest examples, KATE, 2101.06804 (by words here, since an endpoint need not tell vectors); successive halving,
1502.07943. Candidates have their labels' classes as evenly as k allows, come in an order by chance, and race: half of
the dev records first, for the better half of the candidates all of them. No examples at all is a candidate too.

Model: Logprobs, Top (bounds, of which the middle is taken) or Text (the class that the text begins with: candidates are
then told apart by accuracy alone); with a Codec, candidates that leave no room in the context are left out, else the
model refuses them itself. Data: train to take examples from, dev to choose by (else what train has beyond `examples`).
Result: a program of the prompt and the model, which gives Classes. Errors: DataError where no candidate fits, or where
nothing is left to choose by. Queries: known before, see cost.

    lfm run prompt.demonstrations model=model train=train.jsonl dev=dev.jsonl --set k=2 --out shown
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

import lfm.core
from lfm import prompting
from lfm.core import Cost, Data, DataSlot, Inputs, Meta, Method, Model, Parts, Run, Sizes, Slot
from lfm.core.errors import DataError
from lfm.core.finding import table
from lfm.core.interfaces import Codec
from lfm.data.records import Label, Pair
from lfm.models.program import program
from lfm.prompting import racing
from lfm.prompting.classifier import Classifier, Prompt, labels_of, questions, verbalizer
from lfm.prompting.examples import Near, demonstrations, interfaces_near, refuse_unfit
from lfm.prompting.reading import Reader
from lfm.prompting.shots import evenly, shots
from lfm.prompting.template import checked

ID = "prompt.demonstrations"
ANSWER = 8
"""Tokens that an answer in words may take, and tokenizers put around a text."""


class Config(lfm.core.Config, frozen=True):
    k: Annotated[int, Meta(ge=1, description="examples before a text")] = 4
    pick: Annotated[
        Literal["sets", "orders", "random", "nearest"],
        Meta(description="search sets, orders of one set, take one by chance, or the nearest to each text"),
    ] = "sets"
    by: Annotated[racing.By, Meta(description="what the search maximises; entropy needs no labels")] = "accuracy"
    candidates: Annotated[int, Meta(ge=1, description="sets or orders that are tried")] = 16
    rounds: Annotated[int, Meta(ge=1, description="rounds of the race; each halves the candidates")] = 3
    template: Annotated[str, Meta(description="how a record is asked; empty: its own wording")] = ""
    words: Annotated[dict[str, tuple[str, ...]], Meta(description="label → words; the label if absent")] = (
        msgspec.field(default_factory=dict)
    )
    examples: Annotated[int, Meta(ge=2, description="most records to take examples from, and to choose by")] = 32


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    pool, dev = shots(inputs, config.examples, run.seed_for("examples"))
    labels = labels_of(pool, dev)
    bare = Prompt(words=verbalizer(labels, config.words), template=config.template)
    if config.pick == "nearest":
        near = Near(labels=labels, prompt=bare, pool=tuple(pool), k=config.k)
        refuse_unfit(model, [shown(near.pool[: config.k], bare, labels)], pool)
        return program(ID, config, Parts({"model": (model,)}, {}, {"near": msgspec.to_builtins(near)}), opened)
    if config.pick == "random":
        (chosen,) = drawn(config, pool, run)[:1]
        best = refuse_unfit(model, [shown(chosen, bare, labels)], pool)[0]
    else:
        best = searched(config, model, bare, drawn(config, pool, run), dev, labels, run)
    classifier = Classifier(labels=labels, prompts=(best,))
    return program(ID, config, Parts({"model": (model,)}, {}, msgspec.to_builtins(classifier)), opened)


def shown(chosen: Sequence[Label | Pair], bare: Prompt, labels: Sequence[str]) -> Prompt:
    return msgspec.structs.replace(bare, before=demonstrations(chosen, bare, labels))


def drawn(config: Config, pool: Sequence[Label | Pair], run: Run) -> list[list[Label | Pair]]:
    """Candidates: other sets, or other orders of one."""
    found = []
    for number in range(config.candidates):
        chosen, _ = evenly(pool, config.k, run.seed_for("set", 0 if config.pick == "orders" else number))
        found.append(random.Random(run.seed_for("order", number)).sample(chosen, len(chosen)))
    return found


def searched(
    config: Config,
    model: Model,
    bare: Prompt,
    candidates: Sequence[Sequence[Label | Pair]],
    dev: Sequence[Label | Pair],
    labels: Sequence[str],
    run: Run,
) -> Prompt:
    """The best of the candidates, and of none, on the records that choose."""
    if not dev:
        raise DataError(
            "no records are left to choose examples by", why="train has no more than `examples`", fix="give dev="
        )
    prompts = list(dict.fromkeys([bare, *(shown(chosen, bare, labels) for chosen in candidates)]))
    kept = refuse_unfit(model, prompts, dev)
    order = racing.race(Reader(model), kept, dev, labels, by=config.by, rounds=config.rounds, run=run, name="round")
    best = order[0]
    run.note(score=best.score, accuracy_on_dev=best.accuracy, too_long=len(prompts) - len(kept))
    rows = [
        {"score": one.score, "accuracy": one.accuracy, "records": one.records, "before": kept[one.number].before}
        for one in order
    ]
    table(f"{len(kept)} choices of examples, of which the best tells {100 * best.accuracy:.1f} % of dev", rows).beside(
        run.work
    )
    return kept[best.number]


def opened(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The model behind the saved examples."""
    if "near" in parts.state:
        return interfaces_near(parts.model("model"), msgspec.convert(parts.state["near"], Near))
    return prompting.interfaces(parts.model("model"), msgspec.convert(parts.state, Classifier))


def agree(config: Config, inputs: Inputs) -> None:
    labels = labels_of(inputs.records("train"), inputs.records("dev"))
    verbalizer(labels, config.words)
    checked(config.template, fills=inputs.model("model").facts.task == "masked-lm")
    searches = config.pick in ("sets", "orders")
    if searches and not inputs.records("dev") and len(inputs.records("train")) <= config.examples:
        raise DataError(
            f"no records are left to choose examples by: train has {len(inputs.records('train'))}",
            why=f"up to {config.examples} of them are what examples are taken from",
            fix="give dev=FILE, or lower examples",
        )


def cost(config: Config, sizes: Sizes) -> Cost:
    """The most that it can take."""
    facts, train = sizes.model("model"), sizes.data["train"]
    chosen_by = sizes.data.get("dev")
    rows = min(chosen_by.records if chosen_by else max(0, train.records - config.examples), config.examples)
    searches = config.pick in ("sets", "orders")
    pairs = racing.asked(config.candidates + 1, rows, config.rounds) if searches and rows else 0
    labels = questions(sizes, config.words)
    length = train.tokens / max(train.records, 1) + len(config.template) + ANSWER
    tokens = int(pairs * labels * length * (config.k + 1))
    return Cost(
        flops=2.0 * facts.parameters * tokens,
        steps=config.rounds,
        memory=2 * 4 * facts.parameters,
        disk=20_000 + 4 * train.tokens,
        queries=pairs * labels,
        tokens=tokens,
    )


METHOD = Method(
    paper="https://arxiv.org/abs/2104.08786",
    config=Config,
    models={
        "model": Slot((), any_of=prompting.ACCESS, also=(Codec,), help="a language model; an endpoint will do"),
    },
    data={
        "train": DataSlot(Data.FEW_SHOT, kinds=("label", "pair"), help="what examples are taken from"),
        "dev": DataSlot(Data.FEW_SHOT, kinds=("label", "pair"), optional=True, help="to choose them by"),
    },
    run=run,
    cost=cost,
    agree=agree,
    open=opened,
)
