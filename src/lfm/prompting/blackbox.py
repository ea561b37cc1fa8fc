"""Soft prompts found by search: records as a model of embeddings reads them, a prompt's loss, and the search for one.

One searched vector for each of a prompt's layers, in turn; the dev records choose among what was found, and say when to
begin anew. Sources: Black-Box Tuning, arXiv 2201.03514, and BBTv2, 2205.11200, with their code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, final

import msgspec

import lfm.core
from lfm import search
from lfm.core import Cost, Embeddings, Inputs, Meta, Run, Sizes
from lfm.core.errors import ConfigError, DataError
from lfm.core.heavy import F, torch
from lfm.core.method import Amount
from lfm.data.records import Label, Pair
from lfm.data.wording import spaced
from lfm.models.prompted import fitted, logprobs, pieces, room
from lfm.models.soft import ManyPrompts
from lfm.prompting.shots import shots
from lfm.prompting.template import checked, filled, frame
from lfm.search.cma import finite

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

AT_ONCE = 2**26
"""Bytes of embeddings that are put together at a time."""

BYTES = 4
"""Of text, for each token that an amount of data is said to have (lfm.data.files.amount)."""

SPECIALS = 4
"""Tokens that a tokenizer may put around a text."""

LETTERS = 24
"""Of a word, in which its first token is looked for."""

CHECK = 24
"""Queries by which the saved program is held against the one in memory."""


class Setting(lfm.core.Config, frozen=True):
    """How a prompt is searched. A method's Config inherits these settings, with its paper's defaults."""

    template: Annotated[
        str, Meta(description="how a record is asked: {text}, {text_b}, {mask}; empty: its own wording")
    ] = ""
    words: Annotated[dict[str, str], Meta(description="label → the word that stands for it; the label if absent")] = (
        msgspec.field(default_factory=dict)
    )
    examples: Annotated[
        int, Meta(ge=2, description="most records to train on, and to choose by; the paper has 16 a class")
    ] = 32
    prompt_tokens: Annotated[int, Meta(ge=1, description="length of the prompt")] = 50
    d: Annotated[int, Meta(ge=2, description="dimension that is searched, of each layer's prompt")] = 500
    calls: Annotated[int, Meta(ge=4, description="prompts tried, each on all training records")] = 8000
    popsize: Annotated[int, Meta(ge=2, description="prompts a generation of the search")] = 20
    sigma: Annotated[float, Meta(gt=0, description="first step size σ")] = 1.0
    alpha: Annotated[float, Meta(gt=0, description="α: how far the projection reaches, in stds of what it adds to")] = (
        1.0
    )
    loss: Annotated[Literal["ce", "hinge"], Meta(description="over the labels' words")] = "ce"
    margin: Annotated[float, Meta(gt=0, description="m of the hinge loss")] = 2.0
    search: Annotated[
        Literal["auto", "cma", "sep-cma", "lm-ma", "random", "spsa"],
        Meta(description="auto: CMA-ES with its whole covariance where the calls can teach it, else of low rank"),
    ] = "auto"
    restarts: Annotated[int, Meta(ge=1, description="searches that share the calls, each from the start")] = 1
    patience: Annotated[
        int, Meta(ge=0, description="looks at the dev records without a better prompt before a search ends; 0: any")
    ] = 0
    dev_every: Annotated[int, Meta(ge=1, description="generations between looks at the dev records")] = 5


class Told(NamedTuple):
    """A prompt's loss and accuracy on some records."""

    loss: float
    accuracy: float


@final
@dataclass(frozen=True)
class Asked:
    """Records as the model reads them: their texts' embeddings (t, width), the answers' tokens, which is right.

    Texts that are alike are there once: `text` is each record's place among them.
    """

    rows: tuple[Tensor, ...]
    text: tuple[int, ...]
    tokens: tuple[str, ...]
    right: tuple[int, ...]


Tell = Callable[["Tensor", Sequence["Tensor"], Sequence[str]], "Tensor"]
"""Prompts (c, layers, t, width), texts, tokens → (c, texts, tokens) log-probabilities, up to a constant a text."""


def agree(config: Setting, inputs: Inputs) -> None:
    """A method's `agree`: whether records can be asked about by the template."""
    checked(config.template, fills=inputs.model("model").facts.task == "masked-lm")


def prepared(config: Setting, embeddings: Embeddings, inputs: Inputs, run: Run) -> tuple[Asked, Asked | None]:
    """The records to train on, and those that choose. DataError for a single label, ConfigError for words alike.

    A text that is too long for the model with the prompt before it loses its beginning; the notes tell how many did.
    """
    records, dev_records = shots(inputs, config.examples, run.seed_for("examples"))
    labels = sorted({record.label for record in (*records, *dev_records)})
    if len(labels) < 2:
        raise DataError(f"all records have the label {labels[0]!r}", why="a prompt is tuned to tell labels apart")
    tokens = first_tokens(embeddings, filled(config.template, records[0]).prompt, labels, config.words)
    limit = room(inputs.model("model"), config.prompt_tokens)
    train, cut = asked(embeddings, records, labels, tokens, config.template, limit)
    dev, cut_dev = asked(embeddings, dev_records, labels, tokens, config.template, limit) if dev_records else (None, 0)
    if cut + cut_dev:
        run.note(texts_shortened=cut + cut_dev)
    return train, dev


def first_tokens(embeddings: Embeddings, text: str, labels: Sequence[str], own: Mapping[str, str]) -> tuple[str, ...]:
    """The first token of each label's word as it follows a text."""
    words = [own.get(label, label) for label in labels]
    firsts = [pieces(embeddings, text, spaced(text, word)[:LETTERS])[1][0][1] for word in words]
    if len(set(firsts)) < len(firsts):
        clash = next(first for first in firsts if firsts.count(first) > 1)
        same = [word for word, first in zip(words, firsts, strict=True) if first == clash]
        raise ConfigError(
            f"the words {' and '.join(map(repr, same))} begin with the same token {clash!r}",
            why="labels are told apart by the first token of their words",
            fix='give others: words={"label": "word"}',
        )
    return tuple(firsts)


def asked(
    embeddings: Embeddings,
    records: Sequence[Label | Pair],
    labels: Sequence[str],
    tokens: tuple[str, ...],
    template: str,
    limit: int,
) -> tuple[Asked, int]:
    """(the records in words and embedded, how many of their texts are cut to the limit)."""
    texts = [filled(template, record) for record in records]
    once = list(dict.fromkeys(texts))
    after = [[one.suffix for one in once]] if any(one.suffix for one in once) else []
    rows = embeddings.embed([one.prompt for one in once], *after)
    fit = [
        fitted(embeddings, row, *one, limit=limit, frame=frame(template)) for row, one in zip(rows, once, strict=True)
    ]
    told = Asked(
        tuple(fit),
        tuple(once.index(text) for text in texts),
        tokens,
        tuple(labels.index(record.label) for record in records),
    )
    return told, sum(len(a) < len(b) for a, b in zip(fit, rows, strict=True))


def teller(embeddings: Embeddings, top: int) -> Tell:
    """What a model tells after prompts of one layer: all at once where it can, else a query each."""

    def tell(prompts: Tensor, rows: Sequence[Tensor], tokens: Sequence[str]) -> Tensor:
        if isinstance(embeddings, ManyPrompts) and embeddings.spells(tokens):
            return embeddings.told(prompts[:, 0], rows, tokens)
        each = sum((len(one) + prompts.shape[2]) * one.shape[1] * 4 for one in rows)
        found: list[list[float]] = []
        for some in prompts[:, 0].split(max(1, AT_ONCE // each)):
            ranked = embeddings.next_from([torch.cat([p, one]) for p in some for one in rows], top, tokens)
            found += [logprobs(row, tokens) for row in ranked]
        return torch.tensor(found, dtype=torch.float64).reshape(len(prompts), len(rows), len(tokens))

    return tell


def measured(config: Setting, tell: Tell, prompts: Tensor, asked: Asked) -> list[Told]:
    """Each prompt's loss and accuracy on the records."""
    right, text = torch.tensor(asked.right), list(asked.text)
    found: list[Told] = []
    for told in tell(prompts, asked.rows, asked.tokens).double():
        block = told[text]
        hits = float((block.argmax(-1) == right).double().mean())
        found.append(Told(float(LOSSES[config.loss](block, right, config.margin)), hits))
    return found


def cross_entropy(told: Tensor, right: Tensor, margin: float) -> Tensor:
    """Mean over records of −log softmax(told)_right."""
    return F.cross_entropy(told, right)


def hinge(told: Tensor, right: Tensor, margin: float) -> Tensor:
    """Mean over records of Σ over wrong classes of max(0, margin + told_wrong − told_right)."""
    slack = (margin + told - told.gather(1, right[:, None])).clamp(min=0)
    return slack.scatter(1, right[:, None], 0.0).sum(1).mean()


LOSSES: Mapping[str, Callable[[Any, Any, float], Any]] = {"ce": cross_entropy, "hinge": hinge}


def projection(std: float, size: int, config: Setting, generator: torch.Generator) -> Tensor:
    """A (size, d) with entries of N(0, σ_A²), σ_A = α · std / (√d · σ): from z ~ N(0, σ² I), A z has α · std."""
    scale = config.alpha * std / (config.d**0.5 * config.sigma)
    return torch.randn((size, config.d), generator=generator) * scale


def tuned(
    config: Setting, layers: Sequence[Tensor], start: Tensor, tell: Tell, train: Asked, dev: Asked | None, run: Run
) -> Tensor:
    """The best prompt found (layers, t, width), of P₀ + A z over the searched z. start: P₀; layers: each one's A.

    A generation is of one layer; the others keep the best z told so far. Without dev records the training loss chooses.
    """

    def moved(layer: int, points: NDArray[Any]) -> Tensor:
        """(c, t, width): that layer's prompts."""
        return (torch.from_numpy(points).float() @ layers[layer].T).reshape(-1, *start.shape[1:]) + start[layer]

    def whole(held: Tensor, layer: int, points: NDArray[Any]) -> Tensor:
        made = held.repeat(len(points), 1, 1, 1)
        made[:, layer] = moved(layer, points)
        return made

    def judged(name: str, prompt: Tensor) -> tuple[float, float]:
        """(errors, loss) on the records that choose."""
        if dev is None:
            return 0.0, run.step(name, lambda: measured(config, tell, prompt[None], train)[0].loss)
        told = run.step(name, lambda dev=dev: list(measured(config, tell, prompt[None], dev)[0]))
        run.curve("dev accuracy", told[1])
        return 1 - told[1], told[0]

    best = start
    least = begun = judged("start", start)
    rounds = config.calls // generation(config)
    ticks = iter(run.track(range(rounds), "generation", rounds))
    done = 0
    for again in range(config.restarts):
        share = (rounds - done) // (config.restarts - again)
        searchers = [
            search.searcher(
                config.search,
                config.d,
                sigma=config.sigma,
                popsize=generation(config),
                budget=max(share // len(layers), 1) * generation(config),
                seed=run.seed_for("z", *([again] if again else []), *([layer] if layer else [])),
            )
            for layer in range(len(layers))
        ]
        held, lowest, waited = start, [float("inf")] * len(layers), 0
        for number in range(share):
            next(ticks)
            layer = number % len(layers)
            points = searchers[layer].ask()
            prompts = whole(held, layer, points)
            values = run.step(
                f"generation {done}",
                lambda prompts=prompts: finite([t.loss for t in measured(config, tell, prompts, train)]),
            )
            done += 1
            searchers[layer].tell(points, values)
            first = min(range(len(values)), key=values.__getitem__)
            run.curve("train loss", values[first])
            if values[first] < lowest[layer]:
                lowest[layer] = values[first]
                held = prompts[first]
            if dev is None:
                now = (0.0, values[first])
            elif done % config.dev_every == 0 or number + 1 == share:
                now = judged(f"dev {done - 1}", prompts[first])
            else:
                continue
            waited = 0 if now < least else waited + 1
            if now < least:
                best, least = prompts[first], now
            if (config.patience and waited >= config.patience) or all(one.done() for one in searchers):
                break
    list(ticks)
    if dev is not None:
        run.note(accuracy_before=1 - begun[0], accuracy_after=1 - least[0])
    run.note(loss_before=begun[1], loss_after=least[1], generations=done)
    return best.contiguous()


def generation(config: Setting) -> int:
    """Prompts of one generation: no more than may be tried at all."""
    return min(config.popsize, config.calls)


def cost(config: Setting, sizes: Sizes, layers: int) -> Cost:
    """Queries and tokens are the most it can take: a token covers at least a byte, and records are of mean length."""
    facts, given = sizes.model("model"), sizes.data["train"]
    chosen_by = sizes.data.get("dev") or Amount(given.records - config.examples, 0)
    rounds = config.calls // generation(config)
    train, dev = (max(0, min(amount.records, config.examples)) for amount in (given, chosen_by))
    longest = max(amount.tokens * BYTES / max(amount.records, 1) for amount in (given, chosen_by))
    read = ceil(longest) + len(config.template.encode()) + SPECIALS + config.prompt_tokens + 1
    looks = 1 + rounds // config.dev_every + config.restarts
    tried = rounds * generation(config) * train + looks * dev + (0 if dev else train)
    # Once: the table, each text, what stays of one that is cut, and each beginning of each label's word.
    words = sum(sizes.labels.values()) or train + dev
    once = 1 + 2 * (train + dev) + words * (LETTERS + 1)
    prompt = layers * config.prompt_tokens * facts.width
    return Cost(
        flops=2.0 * facts.parameters * tried * read,
        steps=rounds,
        memory=4 * (2 * facts.parameters + prompt * (config.d + 2 * generation(config))) + 2 * AT_ONCE,
        disk=4 * prompt + 10_000,
        queries=tried + once + CHECK,
        tokens=tried * read + CHECK * (config.prompt_tokens + 50),
    )
