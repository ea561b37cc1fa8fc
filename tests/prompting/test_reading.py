"""What is told of a word: exactly, within bounds, or by what is said."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from lfm.core import Logprobs, Model, Text
from lfm.core.errors import AccessError
from lfm.core.interfaces import Ranked, Top
from lfm.models import load
from lfm.prompting.reading import Asked, Reader, bounds, looked_up


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(tiny.causal(tmp_path_factory.mktemp("reading") / "model"))


class Few:
    """The k best next tokens of a model, as an endpoint tells them."""

    def __init__(self, model: Model, k: int) -> None:
        self.model, self.k, self.asked = model, k, 0

    def top(self, prompts: list[str], k: int, suffixes: object = ()) -> list[Ranked]:
        self.asked += len(prompts)
        return self.model.ask(Logprobs).top(prompts, min(k, self.k))


def telling(model: Model, k: int) -> tuple[Model, Few]:
    few = Few(model, k)
    return Model("few", "api", {Top: lambda: few}, lambda: "", look=lambda: model.facts), few


WORDS = ["cat", "dog", "mat", "world"]
ASKED = [Asked("The cat sat on the"), Asked("A"), Asked("The dog is")]


def test_a_few_tokens_bound_what_scoring_tells(whole: Model) -> None:
    exact = Reader(whole.only([Logprobs])).words(ASKED, WORDS)
    assert (exact.low == exact.high).all()
    for k in (1, 5, 300):
        told = Reader(telling(whole, k)[0]).words(ASKED, WORDS)
        assert (told.low <= exact.low + 1e-5).all() and (exact.high <= told.high + 1e-5).all()
    assert np.isinf(Reader(telling(whole, 1)[0]).words(ASKED, WORDS).low).any()


def test_nothing_is_asked_twice(whole: Model) -> None:
    model, few = telling(whole, 5)
    reader = Reader(model)
    first = reader.words([*ASKED, *ASKED], WORDS)
    again = reader.words(ASKED, WORDS[:2])
    assert few.asked == len(ASKED)
    assert (first.high[:3, :2] == again.high).all()


def test_text_tells_what_it_begins_with(whole: Model) -> None:
    class Says:
        def generate(self, prompts: list[str], **_: object) -> list[str]:
            return [" dogs and cats", " dog.", "nothing"][: len(prompts)]

    model = Model("says", "api", {Text: Says}, lambda: "")
    told = Reader(model).words(ASKED, ["dog", "dogs"])
    assert np.exp(told.low).tolist() == [[0, 1], [1, 0], [0, 0]] == np.exp(told.high).tolist()


def test_a_model_that_tells_nothing_of_words_is_refused(whole: Model) -> None:
    with pytest.raises(AccessError, match="tells nothing of words"):
        Reader(whole.only([]))


@given(
    st.lists(st.floats(1e-3, 1), min_size=2, max_size=9),
    st.integers(1, 9),
    st.integers(0, 8),
)
def test_the_bounds_hold_for_every_vocabulary(weights: list[float], k: int, word: int) -> None:
    """A vocabulary of single letters: what is told of the k best holds the true probability of any of them."""
    logp = [math.log(w / sum(weights)) for w in weights]
    told = sorted(((chr(97 + i), v) for i, v in enumerate(logp)), key=lambda pair: -pair[1])[:k]
    low, high = bounds(looked_up(told), chr(97 + word % len(weights)))
    assert low <= logp[word % len(weights)] <= high + 1e-9
    assert high <= 1e-9


def test_a_word_that_begins_with_a_told_token_is_no_likelier_than_it_and_what_is_left() -> None:
    low, high = bounds(looked_up([(" gre", math.log(0.5)), (" bad", math.log(0.3))]), " great")
    assert low == -math.inf
    assert high == pytest.approx(math.log(0.5 + 0.2))


def test_a_local_model_is_read_by_scores(whole: Model, tmp_path: Path) -> None:
    reader = Reader(whole)
    told = reader.words([Asked("The")], ["cat sat"])
    assert told.low[0, 0] == pytest.approx(whole.ask(Logprobs).score(["The"], [" cat sat"])[0].total, abs=1e-5)
