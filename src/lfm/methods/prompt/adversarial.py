"""Red-team a model: a few tokens before a text that make it say something, not say it, or tell classes wrong.

    max_x  mean over texts of s(proj(x) + text),   x ∈ R^{t×d},   proj(x)ᵢ = argmin_{v ∈ V} ‖xᵢ − e_v‖
    s: log p(target | ·), its negative, or max_{c ≠ y} log P(c | ·) − log P(y | ·)

Paper: Adversarial Prompting for Black Box Foundation Models, arXiv 2302.04237, and its code (DebugML): x starts from
N(mean, std) of the embeddings; Square attack or TuRBO (batches of 10, tolerances 10 and 32) in 5,000 calls; a call is a
prompt, scored on all texts. Differs: Square's steps are
a tenth of the embeddings' mean distance, whatever the scores' spread; scores are the model's own log-probabilities, not
another classifier's of sampled text; TuRBO's process is exact; tokens that hold letters of the target or of a label's
words are left out, and those that are no plain words, so that what is found is an effect of context and not the answer
said ahead.

Model: Logprobs, Top (bounds, of which the middle is taken) or Text (only whether a class is said: a step function, hard
to search). Surrogate: Embeddings and Codec, whose tokens are searched among; the model's own where it gives both.
Data: texts to attack on, and dev, optional, on which what was found is tried again. Result: a finding: the best
prefixes beside none, and the curve. Errors: AccessError where nobody gives a table of embeddings; ConfigError for an
aim and a target that do not go together.

    lfm run prompt.adversarial model=model train=train.jsonl --set calls=40 --set first=20 --set tokens=2 --out attacked
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import msgspec

import lfm.core
from lfm import prompting
from lfm.core import Codec, Cost, Data, DataSlot, Embeddings, Inputs, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import AccessError, ConfigError
from lfm.core.finding import Curve, Finding, table
from lfm.core.heavy import np
from lfm.data.records import Label, Pair, Record, Text
from lfm.data.wording import wording
from lfm.prompting.classifier import LEAST, Prompt, labels_of, questions, read, verbalizer
from lfm.prompting.examples import ask_ahead
from lfm.prompting.reading import Reader
from lfm.prompting.replaying import replayed
from lfm.prompting.shots import evenly
from lfm.prompting.template import Asked, checked
from lfm.prompting.tokens import LETTERS, plain_words
from lfm.search.local import Around, around

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHOWN = 10
"""Prefixes in the table."""
TOGETHER = 10
"""Batches that are kept as one step."""

Score = Callable[[Sequence[str], Sequence[Record]], "NDArray[np.float64]"]
"""Prefixes and records → (prefixes, records) of s."""


class Config(lfm.core.Config, frozen=True):
    aim: Annotated[
        Literal["flip", "say", "avoid"], Meta(description="tell classes wrong, or say the target, or not")
    ] = "flip"
    target: Annotated[str, Meta(description="what is to be said, or avoided")] = ""
    tokens: Annotated[int, Meta(ge=1, description="of the prefix")] = 4
    calls: Annotated[int, Meta(ge=1, description="prefixes tried, each on all texts")] = 5000
    first: Annotated[int, Meta(ge=1, description="of them by chance, before it looks around the best")] = 300
    batch: Annotated[int, Meta(ge=1, description="prefixes at once")] = 10
    search: Annotated[Around, Meta(description="how; random is what the others are to beat")] = "turbo"
    template: Annotated[str, Meta(description="how a record is asked; empty: its own wording")] = ""
    words: Annotated[dict[str, tuple[str, ...]], Meta(description="label → words; the label if absent")] = (
        msgspec.field(default_factory=dict)
    )
    examples: Annotated[int, Meta(ge=1, description="most texts to attack on")] = 16


def run(config: Config, inputs: Inputs, run: Run) -> Finding:
    train = inputs.records("train")
    if config.aim == "flip":  # a file may have one class after the other
        train, _ = evenly(cast("Sequence[Label | Pair]", train), config.examples, run.seed_for("examples"))
    train = train[: config.examples]
    reader = Reader(inputs.model("model"))
    score = scorer(config, reader, [*train, *inputs.records("dev")])
    tokens = plain_words(_holder(inputs), spoken(config, inputs))
    found: dict[str, list[float]] = {"": run.step("none", lambda: score([""], train).tolist())[0]}
    undecided = run.step("undecided", lambda: doubtful(config, reader, train)) if config.aim == "flip" else 0
    search = around(
        config.search,
        config.tokens * tokens.width,
        popsize=config.batch,
        first=min(config.first, config.calls),
        noise=tokens.apart / tokens.std,
        seed=run.seed_for("search"),
    )
    best: list[float] = []

    def act(batch: int, known: list[list[float]] | None) -> list[list[float]]:
        points = search.ask()
        prefixes = tokens.nearest(points)
        fresh = [prefix for prefix in dict.fromkeys(prefixes) if prefix not in found]
        told = known if known is not None else score(fresh, train).tolist() if fresh else []
        found.update(zip(fresh, told, strict=True))
        values = [mean(found[prefix]) for prefix in prefixes]
        search.tell(points, [-value for value in values])
        best.append(max([*values, *best[-1:]]))
        return told

    batches = range(config.calls // config.batch)
    for start in run.track(range(0, len(batches), TOGETHER), f"{TOGETHER} batches"):
        replayed(run, f"batches {start}", batches[start : start + TOGETHER], act)
    for value in best:
        run.curve("best score", value)
    dev = inputs.records("dev")
    order = sorted(found, key=lambda prefix: (-mean(found[prefix]), prefix))
    shown = ["", *[prefix for prefix in order if prefix][:SHOWN]]
    told = run.step("dev", lambda: score(shown, dev).tolist()) if dev else []
    return report(config, run, found, dict(zip(shown, told, strict=False)), shown, best, undecided)


def _holder(inputs: Inputs) -> Model:
    """Whose tokens are searched among."""
    return (inputs.all("surrogate") or inputs.all("model"))[0]


def spoken(config: Config, inputs: Inputs) -> list[str]:
    """The words that a prefix must not say ahead."""
    if config.aim != "flip":
        return [word for word in config.target.split() if len(word) >= LETTERS] or [config.target.strip()]
    labels = labels_of(inputs.records("train"), inputs.records("dev"))
    return [word for group in verbalizer(labels, config.words) for word in group]


def scorer(config: Config, reader: Reader, records: Sequence[Record]) -> Score:
    """s, by the aim."""
    if config.aim != "flip":
        sign = 1.0 if config.aim == "say" else -1.0

        def said(prefixes: Sequence[str], some: Sequence[Record]) -> NDArray[np.float64]:
            asked = [Asked(f"{ahead(prefix)}{text_of(record)}") for prefix in prefixes for record in some]
            share = reader.words(asked, [config.target.strip()]).share[:, 0]
            return sign * np.log(share.clip(LEAST)).reshape(len(prefixes), len(some))

        return said
    labelled = [record for record in records if isinstance(record, Label | Pair)]
    labels = labels_of(labelled)
    words = verbalizer(labels, config.words)

    def flipped(prefixes: Sequence[str], some: Sequence[Any]) -> NDArray[np.float64]:
        prompts = [Prompt(words=words, template=config.template, before=ahead(prefix)) for prefix in prefixes]
        ask_ahead(reader, prompts, [some] * len(prompts))
        told = np.stack([read(reader, prompt, some).logp for prompt in prompts])
        right = np.array([labels.index(record.label) for record in some])
        rows = np.arange(len(some))
        own = told[:, rows, right].copy()
        told[:, rows, right] = -np.inf
        return told.max(2) - own

    return flipped


def doubtful(config: Config, reader: Reader, records: Sequence[Record]) -> int:
    """Of how many records, without a prefix, what the model does not tell could change the class."""
    labelled = [record for record in records if isinstance(record, Label | Pair)]
    words = verbalizer(labels_of(labelled), config.words)
    return int(read(reader, Prompt(words=words, template=config.template), labelled).doubtful.sum())


def ahead(prefix: str) -> str:
    return f"{prefix} " if prefix else ""


def text_of(record: Record) -> str:
    return record.text if isinstance(record, Text) else wording(record).prompt


def report(
    config: Config,
    run: Run,
    found: Mapping[str, Sequence[float]],
    dev: Mapping[str, Sequence[float]],
    shown: Sequence[str],
    best: Sequence[float],
    undecided: int,
) -> Finding:
    """The best prefixes beside none, which is first: on the texts they were found on, and on others."""
    rows: list[dict[str, Any]] = []
    for prefix in shown:
        row: dict[str, Any] = {"prefix": prefix}
        for where, marks in (("", found), (" on dev", dev)):
            if prefix in marks:
                row[f"score{where}"] = mean(marks[prefix])
                if config.aim == "flip":
                    row[f"told wrong{where}"] = mean(float(mark > 0) for mark in marks[prefix])
        rows.append(row)
    scores = [mean(marks) for prefix, marks in found.items() if prefix]
    without, top = mean(found[""]), max(scores)
    chance = max(scores[: config.first])
    metrics = {"score without": without, "score": top, "best by chance": chance, "prefixes": float(len(scores))}
    run.note(**metrics, prefix=shown[1], undecided=undecided)
    does = {"flip": "tells classes wrong", "say": f"says {config.target!r}", "avoid": f"avoids {config.target!r}"}
    x = tuple(float(config.batch * (i + 1)) for i in range(len(best)))
    title = f"{shown[1]!r} before a text: the model {does[config.aim]} ({without:.2f} → {top:.2f})"
    if top <= without:
        title = f"No prefix was found by which the model {does[config.aim]} more ({without:.2f} → {top:.2f})"
    if undecided:
        title += f"; of {undecided} texts of {len(found[''])} the class is not decided by what the model tells"
    return msgspec.structs.replace(
        table(title, rows),
        metrics=metrics,
        curves=(Curve(name="best score", x=x, y=tuple(best), x_label="prefixes tried", y_label="score"),),
    )


def agree(config: Config, inputs: Inputs) -> None:
    records = [*inputs.records("train"), *inputs.records("dev")]
    if config.aim == "flip":
        if not isinstance(records[0], Label | Pair):
            raise ConfigError("aim=flip needs classes", why="these texts have none", fix="aim=say target=TEXT")
        verbalizer(labels_of(records), config.words)
        checked(config.template, fills=inputs.model("model").facts.task == "masked-lm")
    elif not config.target.strip():
        raise ConfigError(f"aim={config.aim} needs a target", fix='target="what it should, or should not, say"')
    if config.aim == "flip" and config.target:
        raise ConfigError("aim=flip takes no target", fix="aim=say, or leave the target out")
    if config.calls < config.batch:
        raise ConfigError(f"{config.calls} calls are less than a batch of {config.batch}", fix="raise calls")
    holder = _holder(inputs)
    if not holder.can(Embeddings, Codec):
        raise AccessError(
            f"{holder.ref} gives no table of token embeddings with their texts",
            fix="add surrogate=REF, a local language model, whose tokens are searched among",
        )


def cost(config: Config, sizes: Sizes) -> Cost:
    """The most that it can take: a prefix that is met again is not asked again."""
    facts, train = sizes.model("model"), sizes.data["train"]
    rows = min(train.records, config.examples)
    dev = sizes.data["dev"].records if "dev" in sizes.data else 0
    words = questions(sizes, config.words) if config.aim == "flip" else 1
    pairs = (config.calls + 1) * rows + (SHOWN + 1) * (rows + dev)
    tokens = int(pairs * words * (train.tokens / max(train.records, 1) + config.tokens + len(config.template) + 8))
    return Cost(
        flops=2.0 * facts.parameters * tokens,
        steps=config.calls // config.batch,
        memory=2 * 4 * facts.parameters,
        disk=50_000,
        queries=pairs * words,
        tokens=tokens,
    )


METHOD = Method(
    paper="https://arxiv.org/abs/2302.04237",
    config=Config,
    models={
        "model": Slot((), any_of=prompting.ACCESS, also=(Embeddings, Codec), help="the model to attack"),
        "surrogate": Slot(
            (Embeddings, Codec), min=0, help="whose tokens are searched among; the model's own by default"
        ),
    },
    data={
        "train": DataSlot(Data.FEW_SHOT, kinds=("label", "pair", "text", "completion"), help="texts to attack on"),
        "dev": DataSlot(
            Data.FEW_SHOT, kinds=("label", "pair", "text", "completion"), optional=True, help="to try what was found on"
        ),
    },
    run=run,
    cost=cost,
    agree=agree,
    gives="finding",
)
