"""Ask for a fact in many ways at once: mined prompts and paraphrases, weighed on facts that are known.

    s(o | x, r) = Σ_t softmax(w_r)_t log p(o | x, t)
    w_r = argmax mean over known facts of log softmax_o(s)_{gold} − ρ ‖w‖² / 2

Paper: How Can We Know What Language Models Know? (LPAQA), arXiv 1911.12543: prompts of a relation are mined (the words
between subject and object), paraphrased, ranked by how many known facts they tell; the best are weighed evenly (top-k)
or by w. Here p is over the objects of the relation's known facts while w is found, by L-BFGS from w = 0, with ρ = 0.01,
so that a prompt which is always best does not take all. `paraphrases` of a relation's commonest prompt come, as in the
paper, from two models that translate it there and back; from one, or the model itself where it writes, they are what it
says after the prompts that the facts bring. Differs: they are ranked by how often they are said, in place of the round
trip's probability; prompts end where the object begins, so that causal models can be asked.

Model: Logprobs. Paraphraser: Text. Data: train, facts with their relation and paraphrases; text, to mine prompts in.
Result: a program that gives Logprobs: a text that is one of the known prompts of a relation is asked in all kept ways,
whatever its subject (score is then Σ softmax(w)_t log p, which is no distribution); any other text is put to the model
as it is. Errors: DataError where no prompt holds its subject; ConfigError for paraphrases that nobody writes.

    lfm run prompt.lpaqa model=model train=facts.jsonl --out asked
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import lfm.core
from lfm.core import Cost, Data, DataSlot, Inputs, Logprobs, Meta, Method, Model, Parts, Run, Sizes, Slot, Text
from lfm.core.errors import ConfigError, DataError
from lfm.core.heavy import F, torch
from lfm.data.records import Fact
from lfm.models.program import program
from lfm.prompting.reading import Reader
from lfm.prompting.relations import SAID, SUBJECT, Ensemble, mined, own, paraphrased
from lfm.prompting.template import Asked

if TYPE_CHECKING:
    from torch import Tensor

ID = "prompt.lpaqa"
RIDGE = 0.01
"""ρ: the penalty on a relation's weights."""
DRAWS = 4
"""Samples for each paraphrase that is wanted: many are said twice, or are none."""


class Config(lfm.core.Config, frozen=True):
    weigh: Annotated[Literal["learned", "even"], Meta(description="the kept prompts by w, or alike")] = "learned"
    keep: Annotated[int, Meta(ge=1, description="prompts of a relation that are kept: the best on train")] = 10
    mine: Annotated[int, Meta(ge=0, description="mined prompts of a relation that are tried: the commonest")] = 20
    paraphrases: Annotated[int, Meta(ge=0, description="written prompts of a relation that are tried")] = 0
    facts: Annotated[int, Meta(ge=1, description="most facts of a relation that are asked")] = 32
    objects: Annotated[int, Meta(ge=2, description="most objects of a relation that are told apart")] = 32


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    reader = Reader(model)
    texts = [record.text for record in inputs.records("text")]
    relations = grouped(inputs.records("train"))
    writers = [one.ask(Text) for one in writing(inputs)] if config.paraphrases else []
    draws = DRAWS * config.paraphrases
    kept: dict[str, list[Any]] = {}
    known: dict[str, list[str]] = {}
    single, together = [], []
    for name, facts in run.track(relations.items(), "relation", len(relations)):
        known[name] = own(facts)
        found = mined(facts, texts)[: config.mine]
        if config.paraphrases and known[name]:
            seed = run.seed_for("paraphrases", name)
            said = run.step(f"said {name}", lambda k=known[name], s=seed: paraphrased(writers, k, draws, s))
            found += said[: config.paraphrases]
        tried = list(dict.fromkeys([*known[name], *found]))
        if not tried:
            continue
        facts = facts[: config.facts]
        objects = list(dict.fromkeys(fact.object for fact in facts))[: config.objects]
        facts = [fact for fact in facts if fact.object in objects]
        gold = torch.tensor([objects.index(fact.object) for fact in facts])
        told = run.step(f"relation {name}", lambda t=tried, f=facts, o=objects: asked(reader, t, f, o))
        hits = (told.argmax(2) == gold[:, None]).double().mean(0)
        order = hits.argsort(descending=True, stable=True)[: config.keep]
        weights = (
            learned(told[:, order], gold) if config.weigh == "learned" else torch.full((len(order),), 1 / len(order))
        )
        kept[name] = [[tried[i], float(w)] for i, w in zip(order.tolist(), weights, strict=True)]
        single.append(float(hits[0]))
        mixed = torch.einsum("nto,t->no", told[:, order], weights.double())
        together.append(float((mixed.argmax(1) == gold).double().mean()))
    if not kept:
        raise DataError("no prompt of any fact holds its subject", fix="facts whose prompts name their subjects")
    run.note(accuracy_of_the_commonest=sum(single) / len(single), accuracy_together=sum(together) / len(together))
    return program(ID, config, Parts({"model": (model,)}, {}, {"kept": kept, "known": known}), opened)


def writing(inputs: Inputs) -> Sequence[Model]:
    """Who writes paraphrases: those that are given, else the model."""
    return inputs.all("paraphraser") or inputs.all("model")


def grouped(facts: Sequence[Fact]) -> dict[str, list[Fact]]:
    """The facts by relation."""
    found: dict[str, list[Fact]] = {}
    for fact in facts:
        found.setdefault(fact.relation, []).append(fact)
    return found


def asked(reader: Reader, templates: Sequence[str], facts: Sequence[Fact], objects: Sequence[str]) -> Tensor:
    """(facts, templates, objects) log-probabilities, fp64."""
    questions = [
        Asked(template.replace(SUBJECT, fact.subject), fact.suffix if reader.fills else "")
        for fact in facts
        for template in templates
    ]
    told = torch.from_numpy(reader.words(questions, objects).low)
    return told.reshape(len(facts), len(templates), len(objects)).clamp(min=-1e4)


def learned(told: Tensor, gold: Tensor) -> Tensor:
    """softmax(w) (templates,) that makes the gold objects likeliest among the objects."""
    w = torch.zeros(told.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        mixed = torch.einsum("nto,t->no", told, w.softmax(0))
        value = F.cross_entropy(mixed, gold) + RIDGE / 2 * w.square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    return w.detach().softmax(0)


def opened(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The model behind the saved prompts."""
    model, state = parts.model("model"), parts.state
    return {Logprobs: lambda: Ensemble(model, state["kept"], state["known"])}


def agree(config: Config, inputs: Inputs) -> None:
    if not any(fact.subject in fact.prompt for fact in inputs.records("train")):
        raise DataError("no prompt of any fact holds its subject", fix="facts whose prompts name their subjects")
    given = inputs.all("paraphraser")
    if given and not config.paraphrases:
        raise ConfigError("a paraphraser is given and asked for nothing", fix="paraphrases=8")
    if config.paraphrases and not all(model.can(Text) for model in writing(inputs)):
        raise ConfigError(
            "nobody writes paraphrases: the model gives no text", fix="paraphraser=REF, a model that does"
        )


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, given = sizes.model("model"), sizes.data["train"]
    ways = config.keep + (config.mine if "text" in sizes.data else 0) + config.paraphrases
    asked = given.records * ways * min(config.objects, max(given.records, 1))
    # of each relation, of which there are no more than facts
    said = given.records * config.paraphrases * DRAWS * max(1, len(sizes.models.get("paraphraser", ())))
    queries = asked + said
    tokens = int(queries * given.tokens / max(given.records, 1)) + said * SAID
    return Cost(
        flops=2.0 * facts.parameters * tokens,
        steps=given.records,
        memory=2 * 4 * facts.parameters + 8 * queries,
        disk=50_000,
        queries=queries,
        tokens=tokens,
    )


METHOD = Method(
    paper="https://arxiv.org/abs/1911.12543",
    config=Config,
    models={
        "model": Slot(
            (Logprobs,), also=(Text,), help="a language model that knows facts; an endpoint that scores text will do"
        ),
        "paraphraser": Slot((Text,), min=0, max=2, help="says prompts in other words; two translate, there and back"),
    },
    data={
        "train": DataSlot(Data.FEW_SHOT, kinds=("fact",), help="known facts, to weigh the prompts of each relation"),
        "text": DataSlot(Data.UNLABELED, kinds=("text",), optional=True, help="text to mine prompts in"),
    },
    run=run,
    cost=cost,
    agree=agree,
    open=opened,
)
