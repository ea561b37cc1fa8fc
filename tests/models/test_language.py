"""Scores of many words after one text: nothing is read twice, and what is told is what reading each alone tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from lfm.core.errors import DataError
from lfm.core.interfaces import Batch, Codec, Logits, Logprobs, Text
from lfm.core.model import Model
from lfm.models import load
from lfm.models.language import CausalLogprobs, MaskedLogprobs, Seq2SeqLogprobs, longest

PROMPTS = ["The cat sat on the", "The cat sat on the", "The cat sat on the", "A dog", "A dog", ""]
WORDS = [" mat", " dog", " cat and the dog", " is", " is here", "The"]


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=12))
def test_each_row_begins_the_one_it_is_read_with_and_none_of_those_begins_another(rows: list[list[int]]) -> None:
    kept, places = longest(rows)
    for row, place in zip(rows, places, strict=True):
        assert kept[place][: len(row)] == row
    for i, one in enumerate(kept):
        assert not any(other[: len(one)] == one for j, other in enumerate(kept) if i != j)
        assert one in rows


class Watched:
    """A model's logits, and how many rows and tokens it read for them."""

    def __init__(self, model: Model) -> None:
        self.of, self.rows, self.tokens = model.ask(Logits), 0, 0

    def logits(self, batch: Batch) -> Any:
        self.rows += len(batch["input_ids"])
        self.tokens += int(batch["attention_mask"].sum())
        return self.of.logits(batch)


def test_words_after_one_text_are_read_with_it_once(tmp_path: Path) -> None:
    model = load(tiny.causal(tmp_path / "model"))
    plain, shared = Watched(model), Watched(model)
    alone = CausalLogprobs(plain.logits, model.ask(Codec)).score(PROMPTS, WORDS)
    together = CausalLogprobs(shared.logits, model.ask(Codec), shares=True).score(PROMPTS, WORDS)
    assert [score.tokens for score in together] == [score.tokens for score in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert (plain.rows, shared.rows) == (6, 3) and (plain.tokens, shared.tokens) == (42, 25)


def test_masked_words_of_one_length_leave_one_text(tmp_path: Path) -> None:
    model = load(tiny.masked(tmp_path / "model"))
    watched = Watched(model)
    scored = MaskedLogprobs(watched.logits, model.ask(Codec))
    together = scored.score(["The cat sat on the"] * 3, [" mat", " dog", " cat and"], [" today."] * 3)
    assert watched.rows == 2
    alone = [scored.score(["The cat sat on the"], [word], [" today."])[0] for word in (" mat", " dog", " cat and")]
    assert [one.total for one in together] == pytest.approx([one.total for one in alone], abs=1e-5)


@pytest.mark.parametrize("kind", ["causal", "conv1d"])
def test_of_what_is_longer_than_the_context_the_prompts_beginning_is_left_out(kind: str, tmp_path: Path) -> None:
    """By hand: the opening token, and as many of the last ones as there is room for."""
    model = load(getattr(tiny, kind)(tmp_path / "model"))
    long, tokenizer = "the cat sat on the mat and " * 40, model.ask(Codec).tokenizer
    ids = tokenizer(long + "a dog")["input_ids"]
    word = len(tokenizer("a dog", add_special_tokens=False)["input_ids"])
    opened = ids[:1] if ids[0] in tokenizer.all_special_ids else []
    kept = [*opened, *ids[len(opened) - tiny.CONTEXT :]]
    assert len(kept) == tiny.CONTEXT
    told = model.ask(Logits).logits({"input_ids": torch.tensor([kept])})[0].log_softmax(-1)
    by_hand = [float(told[place - 1, kept[place]]) for place in range(tiny.CONTEXT - word, tiny.CONTEXT)]
    (score,) = model.ask(Logprobs).score([long], ["a dog"])
    assert score.logprobs == pytest.approx(by_hand, abs=1e-5)
    assert model.ask(Logprobs).top([long], 3)[0]
    with pytest.raises(DataError, match=rf"an answer of \d+ tokens does not fit the model's context of {tiny.CONTEXT}"):
        model.ask(Logprobs).score([""], [long])


def test_what_opens_a_text_and_what_follows_its_gap_stay_where_a_long_one_is_shortened(tmp_path: Path) -> None:
    model = load(tiny.masked(tmp_path / "model"))
    watched = Watched(model)
    scored = MaskedLogprobs(watched.logits, model.ask(Codec), context=lambda: 12)
    tokenizer = model.ask(Codec).tokenizer
    long = " ".join(["the cat sat"] * 20)
    (told,) = scored.score([long], [" mat"], [" today."])
    ids = tokenizer(f"{long} mat today.")["input_ids"]
    gap = len(ids) - 1 - len(tokenizer(" today.", add_special_tokens=False)["input_ids"])
    kept = [ids[0], *ids[len(ids) - 11 :]]
    kept[gap - len(ids) - 1 + 12] = tokenizer.mask_token_id
    by_hand = model.ask(Logits).logits({"input_ids": torch.tensor([kept])})[0, gap - len(ids) - 1].log_softmax(-1)
    assert len(told.logprobs) == 1 and watched.tokens == 12
    assert told.total == pytest.approx(float(by_hand[ids[gap - 1]]), abs=1e-5)
    assert scored.top([long], 3, [" today."])[0] and watched.tokens == 24


def test_an_encoder_reads_the_end_of_a_long_prompt(tmp_path: Path) -> None:
    model = load(tiny.seq2seq(tmp_path / "model"))
    codec, long = model.ask(Codec), " ".join(["the cat sat"] * 20)
    ids = codec.tokenizer(long)["input_ids"]
    watched = Watched(model)
    Seq2SeqLogprobs(watched.logits, codec, 0, context=lambda: 12).score([long], ["a dog"])
    assert watched.tokens == 12 < len(ids)


def test_an_empty_prompt_asks_for_a_text_of_the_models_own(tmp_path: Path) -> None:
    """As after the token that texts begin with, where the tokenizer puts none there, as GPT-2's does not."""
    from tokenizers import processors

    begins = load(tiny.causal(tmp_path / "begins"))
    tokenizer = begins.ask(Codec).tokenizer
    expected = begins.ask(Text).generate([""], max_tokens=5), begins.ask(Logprobs).top([""], 3)
    tiny.causal(tmp_path / "bare")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    assert tokenizer("")["input_ids"] == []
    tokenizer.save_pretrained(tmp_path / "bare")
    bare = load(tmp_path / "bare")
    assert bare.ask(Codec).tokenizer("the")["input_ids"] == tokenizer("the")["input_ids"]
    assert (bare.ask(Text).generate([""], max_tokens=5), bare.ask(Logprobs).top([""], 3)) == expected
    assert len(bare.ask(Text).generate(["", "the"], max_tokens=5)) == 2
