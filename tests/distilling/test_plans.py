"""What a plan says a teacher behind HTTP will be asked is about what the run then counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from lfm import runs
from lfm.data import records as data
from lfm.distilling import asking
from lfm.distilling.answers import finer
from lfm.runs import planning

TEXTS = tuple(data.Text(text=line) for line in tiny.CORPUS[:6])


@pytest.mark.parametrize(
    "id, role, settings",
    [
        ("text", "prompts", {"max_tokens": 4}),
        ("response", "train", {"temperature": 1.0}),
    ],
)
def test_queries_and_tokens_are_near_those_of_the_run(
    id: str, role: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tokenizer of 400 tokens, 2.5 bytes each: reckoned with 4 bytes, the tokens of `response` came to two fifths.

    The teacher of random weights says anything, ends nothing and lists no prompt, so that the most is nearly reached.
    """
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    for place in ("big", "small"):
        tiny.causal(tmp_path / place)
    how = settings | {"steps": 1, "batch_size": 2}
    if id == "text":
        how |= {"repeats": 1.0}
    models = {"teacher": [f"serve:{tmp_path / 'big'}"], "student": [tmp_path / "small"]}
    order = runs.Order(f"distill.{id}", models, {role: TEXTS}, how, out=tmp_path / "out")
    planned = planning.plan(runs.prepare(order))
    done = runs.execute(order)
    assert done.queries is not None and done.tokens is not None
    assert 0.75 < planned.queries / done.queries < 1.4
    assert 0.8 < planned.tokens / done.tokens < 1.5, (planned.tokens, done.tokens)


@pytest.mark.parametrize("shown", [2, 6])
def test_a_request_for_new_prompts_is_as_long_as_is_reckoned(shown: int) -> None:
    """Its own words and numbers too: of short prompts they are a third of it."""
    tokenizer = tiny.byte_bpe()
    prompts = [text.text for text in TEXTS[:shown]]
    length = sum(len(tokenizer(prompt)["input_ids"]) for prompt in prompts) / shown
    told = len(tokenizer(asking.request(prompts))["input_ids"])
    assert 0.8 < asking.reading(shown, length, finer(len(tokenizer))) / told < 1.25
