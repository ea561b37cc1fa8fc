"""What texts begin with alike is read once, and says what reading each text whole says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from lfm.core.interfaces import Batch, Codec, Gradients, Logits, Logprobs
from lfm.models import beginnings, load
from lfm.models.beginnings import alike, reading_on
from lfm.models.language import CausalLogprobs

SHOWN = "the cat sat on the mat and a dog was here . " * 6
PROMPTS = [SHOWN + text for text in ("a dog", "the mat", "a cat on a mat", "on the", "here", "a dog was here and")]
OTHERS = ["a cat", "the dog was on"]
WORDS = [" cat", " mat and the dog"]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 2), max_size=4)), min_size=1, max_size=14),
    st.integers(1, 60),
)
def test_sets_hold_each_row_once_and_what_they_begin_with_is_theirs(parts: Any, worth: int) -> None:
    begins = [[7] * 40, [7] * 20 + [8] * 20, [9] * 3, []]
    rows = [[*begins[kind], *rest, 5] for kind, rest in parts]
    most = [len(row) - 1 for row in rows]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(beginnings, "WORTH", worth)
        sets = alike(rows, most)
    assert sorted(i for one in sets for i in one.places) == list(range(len(rows)))
    for one in sets:
        assert all(rows[i][: one.length] == rows[one.places[0]][: one.length] for i in one.places)
        assert all(one.length <= most[i] for i in one.places)
        assert not one.length or one.length * (len(one.places) - 1) >= worth


@pytest.mark.parametrize("kind", ["causal", "conv1d"])
def test_texts_that_begin_alike_are_scored_as_if_read_whole(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(getattr(tiny, kind)(tmp_path / "model"))
    prompts = [p for p in (*PROMPTS, *OTHERS) for _ in WORDS]
    words = WORDS * (len(PROMPTS) + len(OTHERS))
    whole = CausalLogprobs(model.ask(Logits).logits, model.ask(Codec))
    module = model.ask(Gradients).module()
    read = [0]
    module.register_forward_pre_hook(
        lambda _, args, given: read.__setitem__(0, read[0] + given["input_ids"].numel()), with_kwargs=True
    )
    rest = [0]

    def plain(batch: Batch) -> torch.Tensor:
        rest[0] += len(batch["input_ids"])
        return model.ask(Logits).logits(batch)

    begun = reading_on(lambda: module)
    sharing = CausalLogprobs(plain, model.ask(Codec), shares=True, reads_on=begun)
    for one, other in zip(sharing.score(prompts, words), whole.score(prompts, words), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    lengths = [len(ids) for ids in model.ask(Codec).tokenizer(list(PROMPTS))["input_ids"]]
    assert rest[0] <= 2 * len(OTHERS)  # the others, read whole
    assert read[0] < 0.7 * sum(lengths)  # with the trial of whether it reads on
    for one, other in zip(sharing.top(PROMPTS, 3), whole.top(PROMPTS, 3), strict=True):
        assert dict(one) == pytest.approx(dict(other), abs=1e-4)


def test_a_module_that_answers_otherwise_when_it_reads_on_is_read_whole(tmp_path: Path) -> None:
    module: Any = load(tiny.causal(tmp_path / "model")).ask(Gradients).module()
    ids = list(range(5, 25))
    assert reading_on(lambda: module)(ids, [3, 4]) is not None

    def spoiled(_: Any, args: Any, given: dict[str, Any], out: Any) -> Any:
        if given.get("past_key_values") is not None:
            out.logits = out.logits.flip(-1)
        return out

    module.register_forward_hook(spoiled, with_kwargs=True)
    assert reading_on(lambda: module)(ids, [3, 4]) is None


def test_a_trained_prompt_before_the_text_is_read_whole(tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    module: Any = load(tiny.causal(tmp_path / "model")).ask(Gradients).module()
    tuned: Any = get_peft_model(module, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert reading_on(lambda: tuned)(list(range(5, 25)), [3, 4]) is None


def test_a_local_models_scores_read_beginnings_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny.causal(tmp_path / "model"))
    asked: list[int] = []
    real = beginnings._begun
    monkeypatch.setattr(beginnings, "_begun", lambda module, ids: asked.append(len(ids)) or real(module, ids))
    model.ask(Logprobs).score(PROMPTS, [" cat"] * len(PROMPTS))
    assert len(asked) == 1 and asked[0] > 40
