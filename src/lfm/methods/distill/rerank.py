"""Ask a large model only where a small one is unsure, and only about what the small one thinks likely.

    answer(x) = argmax_c p_small(c | x)                          where max_c p_small(c | x) ≥ θ
              = argmax over its `top` likeliest of p_large(c | x, these)     elsewhere

Paper: Large Language Model Is Not a Good Few-shot Information Extractor, but a Good Reranker for Hard Samples!, arXiv
2303.08559 (filter-then-rerank; hard samples go to the large model as a multiple choice; 2.4 % of F1 on average there).
Differs: classes of texts instead of spans and relations; the large model may tell log-probabilities or classes, not
text alone; θ is chosen on dev: of all cuts through its `most` least sure records the one that is right most often, of
equal ones the one that asks least, none where asking never helps. What is told stays a distribution: the mass that the
small model gives its candidates is shared among them as the large one has it.

Models: small (Classes of a prompted model, or Logits and Codec of a classifier), large (Text, Top, Logprobs: a choice
of letters, or with form=words the labels' words in place of {mask}; or Classes, another program's say). Data: dev,
labelled, where no threshold is given. Result: a program of both that gives Classes; it asks the large model about the
unsure alone. With it goes a table of what each cut was right in. Errors: ConfigError without threshold and dev;
MismatchError for classes that the other model lacks; AccessError.

    lfm run distill.rerank small=small large=large dev=dev.jsonl --set most=0.5 --set top=2 --out pair
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, final

import msgspec

import lfm.core
from lfm import prompting
from lfm.core import Codec, Cost, Data, DataSlot, Inputs, Logits, Meta, Method, Model, Parts, Run, Sizes, Slot
from lfm.core.errors import AccessError, ConfigError, MismatchError
from lfm.core.finding import Curve, table
from lfm.core.heavy import np, torch
from lfm.core.interfaces import Classes, Logprobs
from lfm.data.records import Label, Pair
from lfm.data.task import task_for
from lfm.models.program import program
from lfm.prompting.choosing import LETTERS, Chooser, Form, Way, reranked
from lfm.prompting.classifier import spoken, verbalizer
from lfm.prompting.template import checked

if TYPE_CHECKING:
    from numpy.typing import NDArray

ID = "distill.rerank"
CHUNK = 32
"""Records that are one step of a run."""
ROOM = 16
"""Tokens that a choice takes, each, in a cost estimate."""


class Config(lfm.core.Config, frozen=True):
    top: Annotated[
        int, Meta(ge=2, le=len(LETTERS), description="likeliest classes that the large one chooses from")
    ] = 3
    threshold: Annotated[float, Meta(ge=0, le=1, description="how sure is sure enough; 0: chosen on dev")] = 0.0
    most: Annotated[float, Meta(gt=0, le=1, description="share of records that may be asked about, of dev")] = 0.3
    form: Annotated[Form, Meta(description="how it is asked: to name a choice's letter, or to say a word")] = "letters"
    template: Annotated[str, Meta(description="how a record is asked; empty: its own wording")] = ""
    words: Annotated[dict[str, tuple[str, ...]], Meta(description="label → words; the label if absent")] = (
        msgspec.field(default_factory=dict)
    )


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    small, large, dev = inputs.model("small"), inputs.model("large"), inputs.records("dev")
    parts = {"small": (small,), "large": (large,)}
    threshold = config.threshold
    if not threshold:
        threshold = chosen(config, classes_of(small), Chooser(large, way(config)), dev, run)
    run.note(threshold=threshold)
    for _ in run.track([ID], "pair"):
        pass
    return program(ID, config, Parts(parts, {}, {"threshold": threshold}), opened)


def chosen(config: Config, small: Classes, large: Chooser, dev: Sequence[Label | Pair], run: Run) -> float:
    """θ, by what is right on dev when the k least sure are asked about, for every k."""
    told = np.array(run.once("small", lambda: small.tell(dev).tolist()))
    sure = np.exp(told.max(1))
    order = np.argsort(sure, kind="stable")
    least = order[: int(config.most * len(dev))]
    right = np.array([small.labels.index(record.label) for record in dev])
    seconds: list[int] = []

    def second(some: NDArray[Any]) -> list[int]:
        shares = large.shares([dev[i] for i in some.tolist()], told[some], small.labels)
        return reranked(told[some], shares).argmax(1).tolist()

    for first in run.track(range(0, len(least), CHUNK), "unsure"):
        seconds += run.once(f"unsure {first}", lambda first=first: second(least[first : first + CHUNK]))
    alone = told.argmax(1) == right
    better = (np.array(seconds, dtype=int) == right[least]).astype(int) - alone[least]
    gained = np.concatenate([[0], np.cumsum(better)])
    ends = [k for k in range(len(least) + 1) if k in (0, len(dev)) or sure[order[k - 1]] < sure[order[k]]]  # no ties
    best = max(ends, key=lambda k: (gained[k], -k))
    accuracy = (alone.sum() + gained) / len(dev)
    rows = [{"asked": k / len(dev), "accuracy": float(accuracy[k]), "gain": int(gained[k])} for k in ends]
    asked = order[:best]
    run.note(accuracy_small=float(alone.mean()), accuracy=float(accuracy[best]), asked=len(asked) / len(dev))
    if len(asked):
        small_there = float(alone[asked].mean())
        run.note(unsure_small=small_there, unsure=small_there + float(gained[best]) / len(asked))
    curve = Curve(
        name="right on dev",
        x=tuple(row["asked"] for row in rows),
        y=tuple(row["accuracy"] for row in rows),
        x_label="share asked about",
        y_label="accuracy",
    )
    table(f"asking about {best} of {len(dev)} is right most often", rows, curves=(curve,)).beside(run.work)
    if best in (0, len(dev)):
        return float(best > 0)
    return float((sure[order[best - 1]] + sure[order[best]]) / 2)


@final
class Reranked:
    """The small model's classes, those of unsure records as the large one has them. It is opened when it is asked."""

    def __init__(self, config: Config, parts: Parts) -> None:
        self._config, self._parts = config, parts

    @cached_property
    def _small(self) -> Classes:
        return classes_of(self._parts.model("small"))

    @cached_property
    def _large(self) -> Chooser:
        return Chooser(self._parts.model("large"), way(self._config))

    @property
    def labels(self) -> tuple[str, ...]:
        return self._small.labels

    def tell(self, records: Sequence[Any]) -> NDArray[np.float64]:
        told = self._small.tell(records)
        unsure = np.flatnonzero(np.exp(told.max(1)) < self._parts.state["threshold"])
        if len(unsure):
            shares = self._large.shares([records[i] for i in unsure.tolist()], told[unsure], self.labels)
            told = told.copy()
            told[unsure] = reranked(told[unsure], shares)
        return told


@final
class Headed:
    """The classes of a classifier's head."""

    def __init__(self, model: Model) -> None:
        self._model = model

    @property
    def labels(self) -> tuple[str, ...]:
        return self._model.facts.labels

    def tell(self, records: Sequence[Any]) -> NDArray[np.float64]:
        blank = [msgspec.structs.replace(record, label=self.labels[0]) for record in records]  # labels are not read
        task = task_for(blank, self._model.ask(Codec), self._model.facts)
        ask = self._model.ask(Logits).logits
        parts = [ask(task.collate(blank[i : i + CHUNK])).cpu().double() for i in range(0, len(blank), CHUNK)]
        return torch.cat(parts).log_softmax(-1).numpy()


def classes_of(model: Model) -> Classes:
    """What a small model tells of classes, by prompts or by its head."""
    return model.ask(Classes) if model.can(Classes) else Headed(model)


def opened(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """Both models behind the threshold."""
    return spoken(Reranked(config, parts))


def way(config: Config) -> Way:
    """How the large model is asked."""
    return Way(top=config.top, form=config.form, template=config.template, words=config.words)


def agree(config: Config, inputs: Inputs) -> None:
    small, large, dev = inputs.model("small"), inputs.model("large"), inputs.records("dev")
    if not small.can(Classes) and (small.facts.task != "text-classification" or not small.can(Codec)):
        raise AccessError(
            f"{small.ref} tells no classes",
            why=f"its task is {small.facts.task or 'unknown'}",
            fix="a classifier of texts, or a program of lfm run prompt.…",
        )
    if not config.threshold and not len(dev):
        raise ConfigError("nothing tells how sure is sure enough", fix="dev=FILE with labels, or threshold=0.8")
    labels = small.ask(Classes).labels if small.can(Classes) else small.facts.labels
    others = large.ask(Classes).labels if large.can(Classes) else labels
    for whose, known in (("the small model", labels), ("the large model", others)):
        if lacking := sorted({*(r.label for r in dev), *(labels if known is others else ())} - set(known)):
            raise MismatchError(
                f"{whose} has no class {', '.join(map(repr, lacking))}",
                why=f"its classes are {', '.join(known)}",
                fix="rename them in one place",
            )
    if not large.can(Classes):
        verbalizer(labels, config.words)
        checked(config.template, fills=large.facts.task == "masked-lm" and config.form == "words")


def cost(config: Config, sizes: Sizes) -> Cost:
    """The most that it can take; later each unsure record asks as often."""
    small, large, dev = sizes.model("small"), sizes.model("large"), sizes.data.get("dev")
    gives = sizes.gives.get("large")
    each = config.top if gives and Logprobs in gives[0] and Classes not in gives[0] else 1
    asked = int(config.most * dev.records) * each if dev and not config.threshold else 0
    length = dev.tokens / max(dev.records, 1) + config.top * ROOM if dev else 0
    tokens = int(asked * length)
    return Cost(
        flops=2.0 * (large.parameters * tokens + small.parameters * (dev.tokens if dev else 0)),
        steps=1 + asked // CHUNK,
        memory=4 * (small.parameters + large.parameters) * 2,
        disk=10_000,
        queries=asked,
        tokens=tokens,
        each=each,
    )


METHOD = Method(
    paper="https://arxiv.org/abs/2303.08559",
    config=Config,
    models={
        "small": Slot((), any_of=(Classes, Logits), also=(Codec,), help="tells classes, and how sure it is"),
        "large": Slot((), any_of=(*prompting.ACCESS, Classes), help="is asked about the rest; an endpoint will do"),
    },
    data={
        "dev": DataSlot(
            Data.FEW_SHOT, kinds=("label", "pair"), optional=True, help="labelled, to choose the threshold by"
        )
    },
    run=run,
    cost=cost,
    agree=agree,
    open=opened,
)
