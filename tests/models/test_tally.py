"""Questions counted: what they cost, that none is asked twice, that nothing is asked beyond the budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from lfm import runs
from lfm.core.errors import BudgetError
from lfm.core.interfaces import Codec, Embeddings, Logprobs, Score, Text, Top, Vectors
from lfm.core.model import Model
from lfm.models import load
from lfm.models.api.cache import Cache
from lfm.models.budget import Budget, Meter
from lfm.models.soft import ManyPrompts
from lfm.models.tally import Tally


class Echo:
    """Says each prompt's letters again, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def generate(self, prompts: Sequence[str], **how: Any) -> list[str]:
        self.asked += prompts
        return [prompt[::-1][: how["max_tokens"]] for prompt in prompts]

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        self.asked += zip(prompts, continuations, strict=True)
        return [Score((c,), (-float(len(c)),)) for c in continuations]

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Any]:
        self.asked += prompts
        return [[("a", -1.0), ("b", float("-inf"))][:k] for _ in prompts]


def echo(*kinds: type) -> tuple[Echo, Model]:
    spoken = Echo()
    return spoken, Model("echo", "module", {kind: lambda: spoken for kind in kinds}, lambda: "digest")


def test_every_question_is_counted_with_its_bytes_where_there_is_no_tokenizer() -> None:
    meter = Meter(Budget())
    _, model = echo(Logprobs, Text)
    seen = Tally(meter).over(model)
    seen.ask(Logprobs).score(["ab", "ab"], [" c", " d"])
    assert meter.spent() == (2, 2 * (4 + 4))
    seen.ask(Text).generate(["abc"], max_tokens=50)
    # its answer has three letters: what is reserved for fifty tokens beyond its bound of 3 + 4 is given back
    assert meter.spent() == (3, 16 + (3 + 4) + (3 + 4))


def test_tokens_are_the_models_own(tmp_path: Path) -> None:
    model, meter = load(tiny.causal(tmp_path / "model")), Meter(Budget())
    Tally(meter).over(model).ask(Logprobs).score(["The cat sat"], [" on"])
    assert meter.spent() == (1, len(model.ask(Codec).tokenizer("The cat sat on")["input_ids"]))


def test_nothing_is_asked_twice_not_even_by_another_process(tmp_path: Path) -> None:
    first, model = echo(Logprobs, Top, Text)
    meter = Meter(Budget(path=tmp_path / "spent"))

    def ask(model: Model) -> list[Any]:
        seen = Tally(meter, Cache(tmp_path)).over(model)
        return [
            seen.ask(Logprobs).score(["x", "y", "x"], ["1", "2", "1"]),
            [list(map(tuple, ranked)) for ranked in seen.ask(Top).top(["x", "x"], 2)],
            seen.ask(Text).generate(["ab", "ab"], max_tokens=2),
            seen.ask(Text).generate(["ab", "ab"], max_tokens=2, temperature=1.0, seed=3),
        ]

    told = ask(model)
    assert first.asked == [("x", "1"), ("y", "2"), "x", "ab", "ab", "ab"] and meter.spent().queries == 6
    second, again = echo(Logprobs, Top, Text)
    assert ask(again) == told and second.asked == [] and meter.spent().queries == 6


def test_a_call_that_does_not_fit_asks_nothing_and_one_that_fails_costs_nothing() -> None:
    spoken, model = echo(Logprobs, Text)
    meter = Meter(Budget(queries=3))
    seen = Tally(meter).over(model)
    seen.ask(Logprobs).score(["a", "b"], ["1", "1"])
    with pytest.raises(BudgetError, match="2 of 3 queries"):
        seen.ask(Logprobs).score(["c", "d"], ["1", "1"])
    with pytest.raises(ValueError, match="argument 2"):
        seen.ask(Logprobs).score(["c"], [])
    spoken.generate = lambda *_, **__: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        Tally(meter).over(model).ask(Text).generate(["e"])
    assert len(spoken.asked) == 2 and meter.spent().queries == 2


def test_what_comes_after_is_not_counted() -> None:
    spoken, model = echo(Logprobs)
    tally = Tally(Meter(Budget(queries=1)))
    seen = tally.over(model).ask(Logprobs)
    seen.score(["a"], ["1"])
    tally.counts = False
    seen.score(["a", "b", "c"], ["1", "1", "1"])
    assert len(spoken.asked) == 4 and tally.meter.spent().queries == 1


def test_vectors_come_back_as_they_are(tmp_path: Path) -> None:
    model, meter = load(tiny.causal(tmp_path / "model")), Meter(Budget())
    seen = Tally(meter, Cache(tmp_path)).over(model).ask(Vectors)
    texts = ["The cat", "The dog sat"]
    own = model.ask(Vectors).vectors(texts)
    for _ in range(2):
        told = seen.vectors([*texts, texts[0]])
        assert told.dtype == own.dtype and (told == own[[0, 1, 0]]).all() and meter.spent().queries == 2


def test_prompts_of_embeddings_count_for_each_text_and_are_kept(tmp_path: Path) -> None:
    model, meter = load(tiny.causal(tmp_path / "model")), Meter(Budget())
    plain, seen = model.ask(Embeddings), Tally(meter, Cache(tmp_path)).over(model).ask(Embeddings)
    rows = plain.embed(["The cat", "The dog sat"])
    assert isinstance(plain, ManyPrompts) and isinstance(seen, ManyPrompts)
    prompts = torch.stack([plain.table()[:3], plain.table()[3:6]])
    tokens = [ranked[0] for ranked in plain.next_from(rows[:1], 2)[0]]
    assert torch.equal(seen.told(prompts, rows, tokens), plain.told(prompts, rows, tokens).double())
    lengths = sum(len(one) for one in rows)
    assert meter.spent() == (4, 2 * (lengths + 2 * 3 + 2))
    assert [list(map(tuple, r)) for r in seen.next_from(rows, 2)] == [list(r) for r in plain.next_from(rows, 2)]
    assert meter.spent() == (6, 2 * (lengths + 8) + lengths + 2)
    seen.told(prompts, rows, tokens), seen.next_from(rows, 2)
    assert meter.spent().queries == 6


def test_a_run_tells_what_its_model_here_was_asked(tmp_path: Path) -> None:
    here = tiny.causal(tmp_path / "model")
    settings: dict[str, Any] = {"words": {"good": ["cat", "dog"], "bad": ["mat"]}, "content_free": ["N/A", "or"]}
    settings["templates"] = ["{text} It was"]
    order = runs.Order(id="prompt.manual", models={"model": [here]}, settings=settings, out=tmp_path / "out")
    done = runs.execute(order)
    assert done.queries == 2 * 3  # texts without content, of which each is asked for three words
    tokenizer = load(here).ask(Codec).tokenizer
    asked = [f"{text} It was {word}" for text in ("N/A", "or") for word in ("cat", "dog", "mat")]
    assert done.tokens == sum(len(tokenizer(text)["input_ids"]) for text in asked)
