"""Find the tuner for these records: many are tried with many settings, most of them briefly, and the best is kept.

    m*, s* = argmax  quality(m(model, train; s), dev)      over methods m and settings s, most given up after η^(1−R)

`methods` are by default all of `tune` that ask for one model, give one, learn from `train` (and `dev`, if they like)
and read these records: they are found by what they declare, so that one more needs no word here. Of each, the rate is
searched (a tenth to ten times its default), and its rank or width (a quarter to four times), where its Config has one.
All begin at their defaults. A try is trained for η^(1−R) of the epochs first, and again for longer from the start
while it is among the best (`lfm.search.halving`): each length has the whole schedule of its own. In the end the best
tries of the `finalists` that came furthest are trained whole too, so that there is something to compare.

What is told of the winner is measured on `valid`, which chose nothing; without it on half of `dev`, and `dev` itself is
a part of `train` where there is none. Its interval is over those records: that of Agresti and Coull (1998), and for the
difference of two methods, record by record, that of Bonett and Price (2012): Wald's, with four and two records added.
Quality is the share of records told right (of running text: of tokens); of equals the lower loss is better, then fewer
trained numbers. The result is the winner's model as it was tried (after a kill it may be trained once more, to the same
bytes); beside it lie all tries as a table, and quality against trained numbers and time as plots. A try that fails, by
whatever error, says so there, and the others go on.

Models: any with Gradients and a codec. Data: any records with a task. Errors: ConfigError for methods that do not fit;
MismatchError where none could be trained; DataError for too few records.

    lfm run tune.sweep model=base train=train.jsonl --set methods=tune.lora --set trials=3 --out best
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import random
import shutil
import time
from statistics import mean
from typing import Annotated, Any, NamedTuple

import msgspec

import lfm.core
from lfm.core import (
    Codec,
    Cost,
    Data,
    DataSlot,
    Gradients,
    Inputs,
    Meta,
    Method,
    Model,
    Run,
    Sizes,
    Slot,
    launched,
    registry,
)
from lfm.core.config import configure
from lfm.core.errors import DataError, DivergedError, LfmError, MismatchError
from lfm.core.method import check
from lfm.data.records import kind_of
from lfm.models.device import device
from lfm.search import Trial
from lfm.search.alternatives import fixed
from lfm.search.halving import halving, shares
from lfm.search.outcome import Ended, Result, failed, furthest, noted, ranked, told
from lfm.train import LEARNT, suited
from lfm.train.examine import marked
from lfm.tuners.candidates import candidates, fits, knobs


class Config(lfm.core.Config, frozen=True):
    methods: Annotated[tuple[str, ...], Meta(description="ids that are tried; empty: all that fit")] = ()
    trials: Annotated[int, Meta(ge=1, description="tries; every method's defaults are the first")] = 30
    rungs: Annotated[int, Meta(ge=1, description="lengths of training, R; all but the longest end most tries")] = 3
    reduction: Annotated[
        int, Meta(ge=2, description="η: of so many tries one goes on, to as many times the length")
    ] = 3
    finalists: Annotated[
        int, Meta(ge=1, description="methods whose best try is trained whole if the search has not, to be compared")
    ] = 6
    settings: Annotated[
        dict[str, Any], Meta(description="fixed in every method that has them, such as epochs, batch_size")
    ] = msgspec.field(default_factory=dict)
    held_out: Annotated[float, Meta(gt=0, lt=1, description="share of train set aside where there is no dev")] = 0.3


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    records = parted(config, inputs, run.seed_for("held out"))
    spaces = {id: knobs(registry.get(id).method, config.settings) for id in asked(config, inputs)}
    lengths = shares(config.rungs, config.reduction)
    known: dict[str, Result] = {}

    held: list[Held] = []  # the best that was trained whole, alone

    def result(id: str, settings: dict[str, float], rung: int) -> Result:
        key = named(id, settings, rung)
        if key not in known:
            kept: list[Any] = run.step(f"try {key}", lambda: list(tried(id, settings, lengths[rung], key)))
            known[key] = Result(*kept)
            if known[key].error:
                gc.collect()  # what a failed try held on to is memory of the next
        return known[key]

    def tried(id: str, settings: dict[str, float], share: float, key: str) -> Result:
        trial, clock = Trial(run, key), time.process_time if device().type == "cpu" else time.perf_counter
        trial.work.mkdir(parents=True, exist_ok=True)
        began = clock()
        try:
            model = made(id, settings, share, trial)
            seconds = round(clock() - began, 3)
            dev = marked(records["dev"], model)
            valid = marked(records["valid"], model).right if share == 1 else []
            if not math.isfinite(mean(dev.loss)):
                raise DivergedError(f"its loss on dev is {mean(dev.loss)}")
        except Exception as error:
            if launched.size() > 1 and not isinstance(error, LfmError):
                raise  # the other processes are in the midst of this try
            shutil.rmtree(trial.work, ignore_errors=True)
            return failed(error)
        trained = trial.notes.get("trained", inputs.model("model").facts.parameters)
        found = Result(mean(dev.right), mean(dev.loss), valid, int(trained), seconds, "")
        best = share == 1 and all(found.better(one.result) for one in held)
        for one in [one.trial for one in held] if best else [trial]:
            shutil.rmtree(one.work)  # checkpoints
        if best:
            held[:] = [Held(found, trial, model)]
        return found

    def made(id: str, settings: dict[str, float], share: float, trial: Trial) -> Model:
        method = registry.get(id).method
        given = {role: records[role] for role in ("train", "dev") if role in method.data}
        checked = check(id, method, Inputs(inputs.models, given))
        configured = cut(configure(method.config, fixed(method, config.settings) | settings), share)
        if method.agree:
            method.agree(configured, checked)
        model = method.run(configured, checked, trial)
        assert isinstance(model, Model)
        return model

    def score(id: str, settings: dict[str, float], rung: int) -> float | None:
        found = result(id, settings, rung)
        return None if found.error else found.score

    tries = halving(
        spaces,
        score,
        tries=config.trials,
        rungs=config.rungs,
        reduction=config.reduction,
        seed=run.seed_for("search"),
    )
    done: list[Ended] = []

    def best() -> str:
        return f"best {ranked(done)[0].name}" if ranked(done) else ""

    for _ in run.track(range(config.trials), "tries", beside=best):
        one = next(tries)
        rung = len(one.scores) - 1
        done.append(Ended(one.choice, one.settings, lengths[rung], result(one.choice, one.settings, rung)))
    for one in run.track(furthest(done)[: config.finalists], "finalists", beside=best):
        if not one.whole:
            done.append(Ended(one.id, one.settings, 1.0, result(one.id, one.settings, config.rungs - 1)))
    order = ranked(done)
    reasons = list(dict.fromkeys(f"{e.id}: {e.result.error}" for e in done if e.result.error))
    if not order:
        raise MismatchError(
            "no method could be trained on these records",
            why="; ".join(reasons),
            fix="`lfm run ID …` of one of them says what would work; with --debug, where an unexpected error arose",
        )
    if reasons:
        run.note(failed="; ".join(reasons))
    found = told(done, order)
    found.beside(run.work)
    first = order[0]
    run.note(method=first.id, settings=json.dumps(first.settings), tries=len(done), **noted(first))
    key = named(first.id, first.settings, config.rungs - 1)
    if held and held[0].trial.name == key:
        return held[0].model
    return made(first.id, first.settings, 1.0, Trial(run, key))


class Held(NamedTuple):
    """A try with the model that it made."""

    result: Result
    trial: Trial
    model: Model


def named(id: str, settings: dict[str, float], rung: int) -> str:
    """What a try is kept under."""
    return hashlib.sha256(json.dumps([id, settings, rung], sort_keys=True).encode()).hexdigest()[:16]


def asked(config: Config, inputs: Inputs) -> list[str]:
    """The ids of the methods to try."""
    return candidates(config.methods, config.settings, kind_of(inputs.records("train")[0]))


def cut(config: Any, share: float) -> Any:
    """The settings of a training of so much of its length."""
    if config.steps:
        return msgspec.structs.replace(config, steps=max(1, round(config.steps * share)))
    return msgspec.structs.replace(config, epochs=config.epochs * share)


def parted(config: Config, inputs: Inputs, seed: int) -> dict[str, list[Any]]:
    """train, dev and valid: what is given, or else parts drawn by the seed."""
    train, dev, valid = (list(inputs.records(role)) for role in ("train", "dev", "valid"))
    chance = random.Random(seed)
    if not dev:
        chance.shuffle(train)
        aside = min(max(1 if valid else 2, round(config.held_out * len(train))), len(train) - 1)
        train, dev = train[aside:], train[:aside]
    if not valid:
        chance.shuffle(dev)
        dev, valid = dev[len(dev) // 2 :], dev[: len(dev) // 2]
    return {"train": train, "dev": dev, "valid": valid}


def agree(config: Config, inputs: Inputs) -> None:
    asked(config, inputs)
    suited(config, inputs)
    train, dev, valid = (len(inputs.records(role)) for role in ("train", "dev", "valid"))
    if (not dev and train < 3 - bool(valid)) or (dev == 1 and not valid):
        raise DataError(
            "too few records to learn from, to choose by and to measure on",
            why=f"{train} train, {dev} dev, {valid} valid",
        )


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, train = sizes.model("model"), sizes.data["train"]
    every = [listed.method for listed in registry.methods("tune")]
    methods = [registry.get(id).method for id in config.methods] or [m for m in every if fits(m, "")]
    given = Sizes(sizes.models, {"train": train, "dev": train})
    each = [m.cost(configure(m.config, fixed(m, config.settings)), given) for m in methods]
    lengths = shares(config.rungs, config.reduction)
    # of a rung's tries about 1/η go on, and the winner is trained once more
    whole = config.trials * sum(length * config.reduction**-rung for rung, length in enumerate(lengths)) + 1
    held = sum(amount.tokens for amount in sizes.data.values())
    return Cost(
        flops=whole * mean(c.flops for c in each) + config.trials * 2.0 * facts.parameters * held,
        steps=int(whole * mean(c.steps for c in each)),
        memory=max(c.memory for c in each),
        disk=max(c.disk for c in each),
    )


METHOD = Method(
    paper="arXiv:1810.05934",
    config=Config,
    models={"model": Slot((Gradients, Codec), help="the model to tune")},
    data={
        "train": DataSlot(Data.FEW_SHOT, LEARNT, help="what it should learn"),
        "dev": DataSlot(Data.FEW_SHOT, LEARNT, optional=True, help="others, which choose; else a part of train"),
        "valid": DataSlot(
            Data.FEW_SHOT, LEARNT, optional=True, help="others, on which the choice is measured; else half of dev"
        ),
    },
    run=run,
    cost=cost,
    agree=agree,
)
