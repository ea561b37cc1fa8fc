"""Classes read from words."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lfm.core.errors import ConfigError, DataError
from lfm.core.interfaces import Logprobs as LogprobsKind
from lfm.core.interfaces import Score
from lfm.core.model import Model
from lfm.data.records import Label
from lfm.prompting.classifier import (
    Classifier,
    Prompt,
    PromptedClasses,
    Spoken,
    accuracy,
    classes,
    combined,
    labels_of,
    verbalizer,
)
from lfm.prompting.reading import Told


class Table:
    """log p of a word after a prompt, by the prompt's last word."""

    def __init__(self, table: dict[str, dict[str, float]]) -> None:
        self.table = table

    def score(self, prompts: list[str], continuations: list[str], suffixes: object = ()) -> list[Score]:
        return [
            Score((c,), (math.log(self.table[p.split()[-1]][c.strip()]),))
            for p, c in zip(prompts, continuations, strict=True)
        ]


def model(table: dict[str, dict[str, float]]) -> Model:
    return Model("table", "api", {LogprobsKind: lambda: Table(table)}, lambda: "")


def test_a_class_is_the_sum_of_its_words_over_the_prior() -> None:
    """By hand: words .2 + .1 against .3, prior ¾ and ¼: .3/.75 = .4 against .3/.25 = 1.2."""
    told = Told(*[np.log(np.array([[0.2, 0.1, 0.3]]))] * 2)
    assert np.exp(classes(told, [2, 1]).logp) == pytest.approx(np.array([[0.5, 0.5]]))
    found = classes(told, [2, 1], [math.log(0.75), math.log(0.25)])
    assert np.exp(found.logp) == pytest.approx(np.array([[0.25, 0.75]]))
    assert not found.doubtful.any()


def test_what_is_not_told_is_doubtful_where_it_could_matter() -> None:
    low, high = np.log([[0.5, 1e-300], [0.1, 1e-300], [1e-300, 1e-300]]), np.log([[0.5, 0.2], [0.1, 0.2], [0.2, 0.1]])
    assert classes(Told(low, high), [1, 1]).doubtful.tolist() == [False, True, True]
    nothing = np.full((1, 2), -math.inf)
    found = classes(Told(nothing, nothing), [1, 1])
    assert np.exp(found.logp) == pytest.approx(np.array([[0.5, 0.5]])) and found.doubtful.all()


def test_prompts_are_put_together() -> None:
    each = [np.log([[0.9, 0.1]]), np.log([[0.2, 0.8]]), np.log([[0.4, 0.6]])]
    assert np.exp(combined(each, [1, 1, 2], "mean")) == pytest.approx(np.array([[1.9 / 4, 2.1 / 4]]))
    a, b = 0.9**0.5 * 0.2**0.5, 0.1**0.5 * 0.8**0.5
    assert np.exp(combined(each[:2], [3, 3], "product")) == pytest.approx(np.array([[a, b]]) / (a + b))
    assert np.exp(combined(each, [1, 1, 2], "vote")) == pytest.approx(np.array([[0.25, 0.75]]))
    assert np.exp(combined(each[:2], [0, 0], "mean")) == pytest.approx(np.array([[0.55, 0.45]]))


def test_a_prompted_model_tells_classes_and_says_their_names() -> None:
    told = PromptedClasses(
        model({"fun": {"good": 0.3, "bad": 0.1}, "dull": {"good": 0.1, "bad": 0.1}}),
        Classifier(labels=("neg", "pos"), prompts=(Prompt(words=(("bad",), ("good",))),)),
    )
    assert np.exp(told.tell([Label(text="fun", label=""), Label(text="dull", label="")])) == pytest.approx(
        np.array([[0.25, 0.75], [0.5, 0.5]])
    )
    spoken = Spoken(told)
    assert spoken.generate(["so fun"]) == [" pos"]
    assert [s.total for s in spoken.score(["fun", "fun"], [" pos", " maybe"])] == pytest.approx(
        [math.log(0.75), -math.inf]
    )
    assert spoken.top(["fun"], 1) == [((" pos", pytest.approx(math.log(0.75))),)]


def test_words_and_labels_that_cannot_be_told_apart_are_refused() -> None:
    assert verbalizer(["a", "b"], {"a": ["x", "y"]}) == (("x", "y"), ("b",))
    with pytest.raises(ConfigError, match="'b' speaks for two labels"):
        verbalizer(["a", "b"], {"a": ["b"]})
    with pytest.raises(ConfigError, match="words are given for c"):
        verbalizer(["a", "b"], {"c": ["b"]})
    with pytest.raises(ConfigError, match="empty"):
        verbalizer(["a", "b"], {"a": [" "]})
    with pytest.raises(DataError, match="the label 'a'"):
        labels_of([Label(text="x", label="a")])


def test_accuracy_is_of_the_likeliest() -> None:
    records = [Label(text="", label=label) for label in "aba"]
    assert accuracy(np.log([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9]]), ("a", "b"), records) == pytest.approx(1 / 3)
