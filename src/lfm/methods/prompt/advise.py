"""The best that can be got from a model for so many queries: ways to prompt are tried, the cheapest first.

    m*, s* = argmax  accuracy(m(model, train; s), dev)      over methods m, sizes s that fit what is left

`methods` are by default all of `prompt` that ask the model for no more than it gives to those who only ask (text, next
tokens, log-probabilities, embeddings in their place), make a model of `train`, and read these records: they are found
by what they declare, so that one more needs no word here. Each is tried with at most a sixteenth of the budget, in the
order of what it says it costs; then those whose interval still reaches the best accuracy get a fourth, and all that is
left. Sizes (calls, rounds, generations, candidates, and last the examples) are made smaller than their defaults,
together, until a try fits. All that is asked, for making and for judging, is charged before it is asked, and nothing is
asked twice: not by two methods, nor after a kill. It ends when the budget is spent, or all is tried whole, or when more
would not pay:

    gain of the best accuracy over the last `patience` tries / doublings of all queries in them · doublings by the next
        <  half the width of the best's 95 % interval

once every method was tried, and `patience` larger tries were made. The result is the best try's model; beside it lie
all tries as a table, and accuracy by queries. Without `valid`, the accuracy told is that on the records that chose, a
little too good where tries were many.

Data: label or pair records; `held_out` of train chooses where there is no dev. Errors: ConfigError for methods that do
not fit; MismatchError where none could be tried; DataError for too few records.

    lfm run prompt.advise model=model train=train.jsonl --set queries=200 --out best
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from statistics import mean
from typing import Annotated, Any, NamedTuple

import msgspec

import lfm.core
from lfm.core import Cost, Data, DataSlot, Inputs, Meta, Method, Model, Run, Sizes, Slot, registry
from lfm.core.config import configure
from lfm.core.errors import AccessError, BudgetError, ConfigError, DataError, MismatchError
from lfm.core.method import check
from lfm.data import files
from lfm.data.records import Label, Pair, kind_of
from lfm.models.api.cache import Cache, digest_of
from lfm.models.budget import UNLIMITED, Budget, Meter
from lfm.models.tally import ASKED, Tally
from lfm.prompting.advice import Attempt, answer, best, expected, half, told
from lfm.prompting.classifier import labels_of
from lfm.prompting.judging import judged
from lfm.prompting.shots import evenly
from lfm.search import Trial
from lfm.search.alternatives import alone, fixed, largest, tried

ID = "prompt.advise"
SHARES = (1 / 16, 1 / 4, 1.0)
"""Of the budget, the most that a try takes when its method is tried for the first time, again, and at last."""

TOGETHER = 16
"""Records that are judged between two looks at the budget."""

REASONS = 3
"""Why tries came to nothing, of which so many are told."""

SHORT = "tokens are spent"
"""How a budget says that it was the tokens."""

KINDS = ("label", "pair")
FAULTS = (AccessError, BudgetError, ConfigError, DataError, MismatchError)
"""What rules out a try and not the run: a server that fails is no method's fault."""


class Config(lfm.core.Config, frozen=True):
    queries: Annotated[int, Meta(ge=1, description="most questions that are asked, for making and for judging")] = 2000
    tokens: Annotated[int, Meta(ge=0, description="most tokens of them, read and written; 0: no limit")] = 0
    methods: Annotated[tuple[str, ...], Meta(description="ids that are tried; empty: all that fit")] = ()
    settings: Annotated[
        dict[str, Any], Meta(description="fixed in every method that has them, such as words, template")
    ] = msgspec.field(default_factory=dict)
    patience: Annotated[int, Meta(ge=1, description="tries over which the gain is looked at")] = 3
    judged: Annotated[int, Meta(ge=2, description="most held-out records that each try is judged on")] = 100
    held_out: Annotated[float, Meta(gt=0, lt=1, description="share of train set aside where there is no dev")] = 0.5


class Try(NamedTuple):
    """A method at a size, and what it says that it will ask: to be made, and to be judged on all records."""

    id: str
    changed: dict[str, Any]
    settings: dict[str, Any]
    queries: int
    judging: int


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    records = parted(config, inputs, run.seed_for("held out"))
    labels = labels_of(*records.values())
    common = Counter(record.label for record in records["dev"]).most_common(1)[0][1] / len(records["dev"])
    meter = Meter(Budget(config.queries, config.tokens or None, run.work / "spent.sqlite"))
    tally = Tally(meter, Cache(run.work / "answers"))
    model = tally.over(inputs.model("model"))
    halves = evenly(records["train"], (len(records["train"]) + 1) // 2, run.seed_for("halves"))
    done: list[Attempt] = []
    held: dict[str, Model] = {}  # the best that was made since the run began, alone
    least: dict[str, int] = {}  # what the smallest try of each method takes

    def given(method: Method[Any]) -> dict[str, list[Label | Pair]]:
        """What it learns from; of that the half chooses, where a method asks for such records."""
        return dict(zip(("train", "dev"), halves)) if "dev" in method.data else {"train": records["train"]}

    def attempt(one: Try) -> Attempt:
        key = digest_of([one.id, one.settings])[:16]
        before = done[-1].spent if done else 0

        def result() -> list[Any]:
            right, error = [], ""
            try:
                made = remade(one)
                for start in range(0, len(records["dev"]), TOGETHER):
                    right += judged(made, records["dev"][start : start + TOGETHER], labels, configured(one))
                if right and mean(right) > max((a.accuracy for a in done), default=-1.0):
                    held.clear()
                    held[key] = made
            except FAULTS as fault:
                error = f"{fault.what}{f' ({fault.why})' if fault.why else ''}"
                right = right if isinstance(fault, BudgetError) and len(right) * 2 >= len(records["dev"]) else []
            return [right, *meter.spent(), error]

        right, spent, tokens, error = run.step(f"try {key}", result)
        return Attempt(one.id, one.changed, right, spent - before, spent, tokens, error)

    def remade(one: Try) -> Model:
        method, trial = registry.get(one.id).method, Trial(run, digest_of([one.id, one.settings])[:16])
        trial.work.mkdir(parents=True, exist_ok=True)
        checked = check(one.id, method, Inputs({"model": (model,)}, given(method)))
        if method.agree:
            method.agree(configured(one), checked)
        made = method.run(configured(one), checked, trial)
        shutil.rmtree(trial.work, ignore_errors=True)
        assert isinstance(made, Model)
        return made

    def sized(id: str, share: float) -> Try | None:
        """The method as large as may be at this share of the budget, and of what is left when its judging is paid."""
        method = registry.get(id).method
        known = [a.queries for a in done if a.id == id and a.right]
        left = config.queries - (done[-1].spent if done else 0)
        base = configure(method.config, fixed(method, config.settings), where=id)

        sizes = files.sizes(Inputs({"model": (model,)}, given(method)))

        def queries(made: Any) -> int:
            """For making, and for what judging takes beyond a question for each class."""
            cost = method.cost(made, sizes)
            return cost.queries + len(records["dev"]) * max(0, cost.each - len(labels))

        def judging(made: Any) -> int:
            each = method.cost(made, sizes).each or len(labels)
            return len(records["dev"]) * (1 if known else min(each, len(labels)))

        def fits(made: Any) -> bool:
            asked = queries(made)
            least[id] = min(asked + judging(made), least.get(id, UNLIMITED))
            return asked <= share * config.queries and asked + judging(made) <= left

        if (found := largest(base, queries, fits)) is None:
            return None
        changed, made = found
        return Try(id, changed, fixed(method, config.settings) | changed, queries(made), judging(made))

    def status() -> str:
        first = best(done)
        return f"best {first.id} {first.accuracy:.3f} ± {half(first):.3f}, {done[-1].spent:,} queries" if first else ""

    ended, small, over = "all that fits was tried whole", 2**31, False
    ids = candidates(config, inputs)

    def waits() -> bool:
        """Whether a method that fits was not tried yet."""
        met = {a.id for a in done}
        return any(id not in met and sized(id, 1.0) is not None for id in ids)

    for share in SHARES:
        known = {(a.id, str(a.settings)) for a in done}
        now = (one for id in reaching(ids, done) if (one := sized(id, share)) is not None)
        queue = sorted(
            (one for one in now if (one.id, str(one.changed)) not in known), key=lambda one: one.queries + one.judging
        )
        for one in run.track(queue, f"tries of at most 1/{round(1 / share)} of the budget", len(queue), beside=status):
            now_fits = sized(one.id, share)  # what is left has become less
            if now_fits is None or now_fits.queries < one.queries:
                ended = "what is left of the budget allows no larger try"
                continue
            if len(done) - small >= config.patience and (short := not_worth(done, one.queries, config.patience)):
                if over := not waits():
                    ended = short
                    break
                if any(a.id == one.id for a in done):
                    ended = short
                    continue
            done.append(attempt(one))
        if over:
            break
        small = min(small, len(done))
    first = best(done)
    if first is None:
        faults = list(dict.fromkeys(a.error for a in done if a.error))
        reasons = "; ".join(faults[:REASONS]) or (
            f"{config.queries:,} queries are too few to make the smallest and judge it on {len(records['dev'])} records"
        )
        enough = min(least.values(), default=0)
        small_budget = f"allow {enough:,} queries or more, or judge on fewer records: judged=N"
        fix = small_budget if enough > config.queries else "try one by itself: `lfm run` says more"
        if config.tokens and faults and all(SHORT in fault for fault in faults):
            fix = "allow more tokens"
        raise MismatchError("no method could be tried on these records", why=reasons, fix=fix)
    chosen = Try(first.id, first.settings, fixed(registry.get(first.id).method, config.settings) | first.settings, 0, 0)
    key = digest_of([chosen.id, chosen.settings])[:16]
    tally.counts, made = True, held.get(key) or remade(chosen)
    valid: list[float] = []
    if records["valid"]:
        try:
            valid = run.step("valid", lambda: judged(made, records["valid"], labels, configured(chosen)))
        except BudgetError:
            ended += "; nothing was left to measure it on valid"
    tally.counts = False  # what comes after is not the search's
    met = {a.id for a in done}
    if untried := [f"{id} ({least[id]:,} at least)" for id in ids if id not in met and id in least]:
        ended += f"; not tried for want of queries: {', '.join(untried)}"
    title = answer(done, config.queries, common, ended, valid)
    told(done, title, common).beside(run.work)
    at = first.at
    run.note(
        advice=title,
        method=first.id,
        settings=msgspec.json.encode(first.settings).decode(),
        tries=len(done),
        asked=done[-1].spent,
        asked_tokens=done[-1].tokens,
        accuracy=at.value,
        accuracy_low=at.low,
        accuracy_high=at.high,
    )
    return made


def configured(one: Try) -> Any:
    return configure(registry.get(one.id).method.config, one.settings, where=one.id)


def reaching(ids: Sequence[str], done: Sequence[Attempt]) -> list[str]:
    """The methods that were not tried yet, and those whose last try's interval reaches the best accuracy."""
    first, last = best(done), {one.id: one for one in done}
    least = first.accuracy if first else 0.0
    return [id for id in ids if id not in last or (last[id].right and last[id].at.high >= least)]


def not_worth(done: Sequence[Attempt], queries: int, patience: int) -> str:
    """Why so many queries more would not pay; "" where they may."""
    first = best(done)
    if first is None or (gain := expected(done, queries, patience)) >= half(first):
        return ""
    return f"more would not pay: {queries:,} queries promise {gain:.3f}, and less than {half(first):.3f} cannot be told"


def candidates(config: Config, inputs: Inputs) -> list[str]:
    """The methods to try. ConfigError for one that is named and cannot be."""
    kind, given = kind_of(inputs.records("train")[0]), inputs.model("model").gives.keys()

    def fits(id: str, method: Method[Any]) -> bool:
        return id != ID and alone(method, kind) and not method.models["model"].missing(given)

    why = f"what is tried learns from `train` alone, here {kind} records, and only asks, as this model answers"
    return tried("prompt", fits, config.methods, config.settings, why=why)


def parted(config: Config, inputs: Inputs, seed: int) -> dict[str, list[Label | Pair]]:
    """train, dev and valid: what is given; of train a part, evenly of each class, where there is no dev."""
    train, dev, valid = (list(inputs.records(role)) for role in ("train", "dev", "valid"))
    if not dev:
        train, dev = evenly(train, max(2, round(len(train) * (1 - config.held_out))), seed)
    return {"train": train, "dev": evenly(dev, config.judged, seed)[0], "valid": valid}


def agree(config: Config, inputs: Inputs) -> None:
    for id in candidates(config, inputs):
        method = registry.get(id).method
        configure(method.config, fixed(method, config.settings), where=id)
    labels_of(inputs.records("train"))
    if not inputs.records("dev") and len(inputs.records("train")) < 4:
        raise DataError("too few records to learn from and to choose by", why=f"{len(inputs.records('train'))} records")


def cost(config: Config, sizes: Sizes) -> Cost:
    """The budget: it is never exceeded, and may not be needed."""
    facts, train = sizes.model("model"), sizes.data["train"]
    each = train.tokens / max(train.records, 1) + 16
    tokens = min(int(config.queries * each), config.tokens or 2**62)
    return Cost(
        flops=2.0 * facts.parameters * tokens,
        steps=config.queries // 8,
        memory=2 * 4 * facts.parameters + 2**26,
        disk=100_000,
        queries=config.queries,
        tokens=tokens,
    )


METHOD = Method(
    paper="arXiv:1810.05934",
    config=Config,
    models={"model": Slot((), any_of=ASKED, help="the model to prompt; an endpoint will do")},
    data={
        "train": DataSlot(Data.FEW_SHOT, KINDS, help="a few examples of each class"),
        "dev": DataSlot(Data.FEW_SHOT, KINDS, optional=True, help="others, which choose; else a part of train"),
        "valid": DataSlot(Data.FEW_SHOT, KINDS, optional=True, help="others, on which the choice is measured"),
    },
    run=run,
    cost=cost,
    agree=agree,
)
