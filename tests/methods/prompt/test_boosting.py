"""prompt.boosting: SAMME against sklearn's, the search against brute force, and what is saved votes as it did."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from case import Case
from lfm import runs
from lfm.core import Inputs, Logprobs, Model
from lfm.core.errors import AccessError, ConfigError, DataError
from lfm.core.interfaces import Classes, Top
from lfm.core.method import check
from lfm.data import files
from lfm.data.records import Label
from lfm.methods.prompt import boosting
from lfm.methods.prompt.boosting import Config
from lfm.models import load
from lfm.prompting.boost import Table, boost, candidates, cut, samme, votes, weighted_errors
from lfm.runs.run import LocalRun

TRAIN = [
    Label(text=f"The {n} sat on the {m}.", label=label)
    for n, m, label in (
        ("cat", "mat", "good"),
        ("dog", "cat", "bad"),
        ("mat", "dog", "good"),
        ("town", "world", "bad"),
        ("cat", "dog", "good"),
        ("small", "mat", "bad"),
    )
]
SMALL = {"templates": ("{text} It was {mask}", "{text} The dog is"), "rounds": 6, "examples": 4}


def case(here: Path) -> Case:
    tiny.causal(here / "model")
    files.write(TRAIN, here / "train.jsonl")
    return Case(models={"model": ("model",)}, data={"train": "train.jsonl"}, settings=SMALL)


def tables(n: int, words: int, count: int, classes: int, seed: int) -> tuple[list[Table], Any, Any]:
    """Random answers that know a little of the classes."""
    random = np.random.default_rng(seed)
    right, dev = random.integers(classes, size=n), random.integers(classes, size=n)
    right[:classes] = dev[:classes] = np.arange(classes)
    told = []
    for _ in range(count):
        means = random.random((classes, words)) * 0.3
        shares = [means[y] + random.random((n, words)) for y in (right, dev)]
        told.append(Table(tuple(f"w{i}" for i in range(words)), *shares))
    return told, right, dev


def test_the_search_finds_the_best_of_all_tuples_of_its_candidates() -> None:
    (table,), right, _ = tables(30, 12, 1, 3, seed=1)
    weights = np.random.default_rng(2).random(30)
    weights /= weights.sum()
    config = Config(candidates=3, tuples=10_000)
    tuples = candidates(table.train, right, weights, 3, config, np.random.default_rng(0))
    score = [
        [sum(w * p * (1 if y == c else -1) for w, p, y in zip(weights, table.train[:, v], right)) for v in range(12)]
        for c in range(3)
    ]
    best: list[list[int]] = [[], [], []]
    for c in range(3):
        mine = [v for v in range(12) if score[c][v] == max(s[v] for s in score)]
        best[c] = sorted(mine, key=lambda v, c=c: -score[c][v])[:3]
    for c in range(3):
        left = [v for v in range(12) if all(v not in group for group in best)]
        best[c] = best[c] or sorted(left, key=lambda v, c=c: -score[c][v])[:3]
    assert set(map(tuple, tuples)) == set(product(*best)) and len(tuples)
    errors = weighted_errors(table.train, tuples, right, weights)
    for words, error in zip(tuples, errors, strict=True):
        wrong = [max(range(3), key=lambda c: table.train[i, words[c]]) != right[i] for i in range(30)]
        assert error == pytest.approx(weights[wrong].sum())


def test_two_classes_may_exchange_their_words_and_too_many_tuples_are_drawn() -> None:
    (table,), right, _ = tables(30, 40, 1, 2, seed=3)
    even = np.full(30, 1 / 30)
    both = {tuple(t) for t in candidates(table.train, right, even, 2, Config(), np.random.default_rng(0))}
    assert both == {(b, a) for a, b in both} and len(both) <= 2 * 20_000
    (table,), right, _ = tables(60, 200, 1, 8, seed=3)
    drawn = candidates(table.train, right, np.full(60, 1 / 60), 8, Config(tuples=100), np.random.default_rng(0))
    assert drawn.shape == (100, 8)


@pytest.mark.parametrize("classes", [2, 4])
def test_weights_are_those_of_samme_in_sklearn(classes: int) -> None:
    """The weak learners that boosting found, given to AdaBoostClassifier one after the other."""
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.ensemble import AdaBoostClassifier

    told, right, dev = tables(60, 20, 3, classes, seed=5)
    config = Config(rounds=9, candidates=4)
    learners = boost(told, right, dev, classes, config, np.random.default_rng(0))
    assert len(learners) == 9 and all(0 < weak.error < 1 - 1 / classes for weak in learners)
    turns = iter(learners)

    class Given(ClassifierMixin, BaseEstimator):
        """The next of the learners, whatever it is fitted to."""

        def fit(self, x: Any, y: Any, sample_weight: Any = None) -> Given:
            self.weak_, self.classes_ = next(turns), np.arange(classes)
            return self

        def predict(self, x: Any) -> Any:
            return votes(told[self.weak_.template].train[x[:, 0].astype(int)], self.weak_.words)

    places = np.arange(60)[:, None]
    theirs = AdaBoostClassifier(Given(), n_estimators=9).fit(places, right)
    assert theirs.estimator_weights_ == pytest.approx([weak.weight for weak in learners])
    assert theirs.estimator_errors_ == pytest.approx([weak.error for weak in learners])
    kept = cut(learners, told, theirs.predict(places), classes, on_dev=False)
    assert kept == learners  # all of them say what all of sklearn's say


def test_a_learner_without_errors_is_chosen_by_dev_and_stands_alone() -> None:
    right = np.array([0, 0, 1, 1])
    train = np.array([[0.9, 0.1, 0.8, 0.2]] * 2 + [[0.1, 0.9, 0.2, 0.8]] * 2)
    dev = train.copy()
    dev[:, 0] = dev[:, 1] = 0.5  # the first two words are of no use there
    found = boost([Table(("a", "b", "c", "d"), train, dev)], right, right, 2, Config(), np.random.default_rng(0))
    (kept,) = cut(found, [Table(("a", "b", "c", "d"), train, dev)], right, 2, on_dev=True)
    assert kept.weight == 1.0 and kept.error == 0.0
    assert (votes(dev, kept.words) == right).all()


def test_a_wrong_record_weighs_more_and_the_weak_learner_is_at_chance_then() -> None:
    """After a step of SAMME with two classes, the learner's weighted error is one half."""
    wrong = np.array([True, False, False, False, True])
    weights = np.array([0.1, 0.2, 0.3, 0.3, 0.1])
    _, moved = samme(0.2, wrong, weights, 2)
    assert moved[wrong].sum() == pytest.approx(0.5) and moved.sum() == pytest.approx(1)


def made(model: Model, here: Path, **settings: Any) -> Model:
    here.mkdir(exist_ok=True)
    config = Config(**{**SMALL, **settings})
    inputs = check(boosting.ID, boosting.METHOD, Inputs({"model": (model,)}, {"train": TRAIN}))
    boosting.agree(config, inputs)
    return boosting.run(config, inputs, LocalRun(0, here))


@pytest.mark.parametrize("access", [Logprobs, Top])
def test_each_record_is_asked_once_a_template(access: type, tmp_path: Path) -> None:
    whole = load(tiny.causal(tmp_path / "model"))
    asked: list[tuple[str, int]] = []
    logprobs = whole.ask(Logprobs)

    class Counted:
        def top(self, prompts: list[str], k: int, suffixes: Any = ()) -> Any:
            asked.extend((prompt, k) for prompt in prompts)
            return logprobs.top(prompts, k, suffixes)

        def score(self, *given: Any) -> Any:
            raise AssertionError("a word was scored by itself")

    model = Model("api:some", "api", {access: Counted}, lambda: "", look=lambda: whole.facts)
    told = made(model, tmp_path / "run").ask(Classes).tell(TRAIN)
    assert told.shape == (6, 2)
    made_by = asked[: len(SMALL["templates"]) * len(TRAIN)]
    assert (
        len(set(made_by)) == len(made_by)
        and set(asked) == set(made_by)
        and {k for _, k in made_by} == {20 if access is Top else 1000}
    )


def test_text_alone_templates_twice_and_one_label_are_refused(tmp_path: Path) -> None:
    whole = load(tiny.causal(tmp_path / "model"))
    from lfm.core import Text

    text = Model("api:some", "api", {Text: lambda: whole.ask(Text)}, lambda: "", look=lambda: whole.facts)
    with pytest.raises(AccessError, match="logprobs or top"):
        made(text, tmp_path / "a")
    with pytest.raises(ConfigError, match="twice"):
        made(whole, tmp_path / "b", templates=("{text} a", "{text} a"))
    with pytest.raises(DataError, match="label 'good'"):
        boosting.agree(Config(), Inputs({"model": (whole,)}, {"train": TRAIN[:1]}))


@pytest.mark.slow
def test_it_beats_the_same_templates_by_hand(tmp_path: Path) -> None:
    """Sixteen examples a class of two moods, three draws: against the labels as words with the same templates."""
    from lfm.methods.prompt import manual
    from lfm.prompting.defaults import templates

    model, records, test = runs.model("zoo:lm"), runs.records("zoo:moods"), runs.records("zoo:moods-test")[:60]
    config = manual.Config(templates=templates(records, fills=False), calibrate=True)
    ours, theirs = [], []
    for seed in range(3):
        inputs = Inputs({"model": (model,)}, {"train": records[seed * 100 : seed * 100 + 100]})
        for method, settings, into in ((boosting, Config(), ours), (manual, config, theirs)):
            made = method.run(settings, inputs, LocalRun(seed, tmp_path / f"{seed}{len(ours)}{len(theirs)}"))
            told = made.ask(Classes).tell(test).argmax(1)
            into.append(np.mean([("bad", "good")[i] == r.label for i, r in zip(told, test, strict=True)]))
    assert np.mean(ours) > np.mean(theirs) + 0.1, (ours, theirs)
