"""Boost many weak prompts into a strong one: each a template and a word for each class, found in cached answers.

    s_t(v, c) = Σᵢ wᵢ p(v | t(xᵢ)) (2·1[yᵢ = c] − 1)
    candidates of c: the likeliest by s_t(·, c) among words whose best class it is (of none: among those left)
    (t, v) = argmin over tuples of candidates of ε = Σᵢ wᵢ 1[argmax_c p(v_c | t(xᵢ)) ≠ yᵢ],   t in turn
    α = log((1 − ε)/ε) + log(K − 1);   wᵢ ← wᵢ exp(α 1[wrong]) / Z;   ŷ = argmax_c Σ α 1[vote = c]          (SAMME)

Paper: PromptBoosting, arXiv 2212.09257, and its code (UCSB-NLP-Chang/PromptBoosting): 10 templates, 200 rounds, as many
candidates a class as make 20,000 tuples (50 at most), of two classes the words exchanged as well. The model is asked
once for each template and example, whatever is searched then. A tuple that is no better than chance is passed over;
the ensemble is cut where dev records are told best (the later, of equals). Where a tuple makes no error α would be
infinite: of all such ones, of every template, the best on dev is taken, and boosting ends. Differs: templates are
generic ones, not written by a large model for each task; words are tokens of letters that begin a word.

Model: Logprobs, of which the 1000 likeliest tokens are taken, or Top, of which an endpoint tells 20 or so: a word that
is not told has the middle of what is possible there. Text alone does not do. Data: train, and dev (else what train has
beyond `examples`; else the training records cut). Result: a program of weak prompts that vote, giving Classes, by one
query a record for each template that it has. Errors: DataError for a single label, or where no words do better than
chance.

    lfm run prompt.boosting model=model train=train.jsonl --set rounds=20 --out boosted
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

import lfm.core
from lfm import prompting
from lfm.core import Cost, Data, DataSlot, Inputs, Logprobs, Meta, Method, Model, Parts, Run, Sizes, Slot
from lfm.core.errors import ConfigError, DataError
from lfm.core.heavy import np, torch
from lfm.core.interfaces import Top
from lfm.data.records import Label, Pair
from lfm.models.program import program
from lfm.prompting.boost import AT_ONCE, Table, Weak, boost, cut
from lfm.prompting.classifier import Classifier, Prompt, accuracy, labels_of, tell
from lfm.prompting.defaults import ONE, templates
from lfm.prompting.reading import Reader
from lfm.prompting.shots import shots
from lfm.prompting.template import checked, filled
from lfm.prompting.vocabulary import vocabulary

if TYPE_CHECKING:
    pass

ID = "prompt.boosting"
WORDS = 4096
"""Words of a template that are kept: the likeliest in the mean."""
ANSWER = 8
"""Tokens that tokenizers put around a text, and one of an answer."""


class Config(lfm.core.Config, frozen=True):
    templates: Annotated[
        tuple[str, ...], Meta(description="ways to ask: {text}, {text_b}, {mask} for the answer; empty: generic ones")
    ] = ()
    rounds: Annotated[int, Meta(ge=1, description="weak prompts tried, template after template")] = 200
    candidates: Annotated[int, Meta(ge=1, description="most words that may speak for a class")] = 50
    tuples: Annotated[int, Meta(ge=2, description="most tuples of words, one a class, that a round compares")] = 20_000
    examples: Annotated[int, Meta(ge=2, description="most records to train on, and to cut by")] = 32


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    reader = Reader(model)
    train, dev = shots(inputs, config.examples, run.seed_for("examples"))
    labels = labels_of(train)
    dev = [record for record in dev if record.label in labels]
    asked = config.templates or templates(train, fills=reader.fills)
    tables = [
        table(run.step(f"template {number}", lambda t=template: told(reader, t, [*train, *dev])), len(train))
        for number, template in enumerate(run.track(asked, "template", len(asked)))
    ]
    right, dev_right = (np.array([labels.index(record.label) for record in some]) for some in (train, dev))
    random = np.random.default_rng(run.seed_for("tuples"))
    learners: list[Weak] = []
    for weak in boost(tables, right, dev_right, len(labels), config, random):
        learners.append(weak)
        run.curve("weighted error", weak.error)
    if not learners:
        raise DataError(
            "no words tell the classes better than chance",
            why="with every template, and any words of those that the model told",
            fix="more templates, or more examples",
        )
    kept = cut(learners, tables, dev_right if len(dev) else right, len(labels), on_dev=bool(dev))
    prompts = tuple(
        Prompt(
            template=asked[weak.template],
            words=tuple((tables[weak.template].words[i],) for i in weak.words),
            weight=weak.weight,
            whole=True,
        )
        for weak in kept
    )
    classifier = Classifier(labels=labels, prompts=prompts, combine="vote")
    run.note(weak_prompts=len(kept), templates_used=len({weak.template for weak in kept}))
    for name, some in (("train", train), ("dev", dev)):
        if some:
            hit = run.step(name, lambda some=some: accuracy(tell(reader, classifier, some), labels, some))
            run.note(**{f"accuracy_on_{name}": hit})
    return program(ID, config, Parts({"model": (model,)}, {}, msgspec.to_builtins(classifier)), opened)


def told(reader: Reader, template: str, records: Sequence[Label | Pair]) -> dict[str, Any]:
    """The template's words and their probabilities, as a step keeps them."""
    checked(template, fills=reader.fills)
    found = vocabulary(reader, [filled(template, record) for record in records], most=WORDS)
    return {"words": list(found.words), "share": torch.from_numpy(found.share)}


def table(told: Mapping[str, Any], split: int) -> Table:
    share = told["share"].numpy()
    return Table(tuple(told["words"]), share[:split], share[split:])


def opened(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The model behind the saved prompts."""
    return prompting.interfaces(parts.model("model"), msgspec.convert(parts.state, Classifier))


def agree(config: Config, inputs: Inputs) -> None:
    labels_of(inputs.records("train"))
    for template in config.templates:
        checked(template, fills=inputs.model("model").facts.task == "masked-lm")
    if len(set(config.templates)) < len(config.templates):
        raise ConfigError("a template is named twice", fix="each once: they take turns anyway")


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, given = sizes.model("model"), sizes.data["train"]
    dev = sizes.data.get("dev")
    rows = min(given.records, 2 * config.examples) if not dev else min(given.records, config.examples)
    rows += min(dev.records, config.examples) if dev else 0
    ways = config.templates or ONE
    asked = len(ways) * rows
    tokens = int(asked * (given.tokens / max(given.records, 1) + max(map(len, ways)) / 4 + ANSWER))
    return Cost(
        flops=2.0 * facts.parameters * tokens,
        steps=len(ways) + config.rounds,
        memory=2 * 4 * facts.parameters + 8 * rows * WORDS * len(ways) + 16 * AT_ONCE,
        disk=200_000,
        queries=asked,
        tokens=tokens,
        each=min(len(ways), config.rounds),
    )


METHOD = Method(
    paper="https://arxiv.org/abs/2212.09257",
    config=Config,
    models={
        "model": Slot((), any_of=(Top, Logprobs), help="a language model; an endpoint with log-probabilities will do")
    },
    data={
        "train": DataSlot(Data.FEW_SHOT, kinds=("label", "pair"), help="a few examples of each class"),
        "dev": DataSlot(Data.FEW_SHOT, kinds=("label", "pair"), optional=True, help="to cut the ensemble by"),
    },
    run=run,
    cost=cost,
    agree=agree,
    open=opened,
)
