"""Conversations: what of them is scored, by templates written out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from lfm.core import Codec, Gradients, Model
from lfm.core.errors import DataError
from lfm.data import chat, packing
from lfm.data.files import amount, digest, read, where, write
from lfm.data.records import Chat, Completion, Message
from lfm.data.task import task_for
from lfm.evals import evaluate
from lfm.models import forward, load

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""Every message on a line; the assistant's ends with the token of the end."""
FORGETS = TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last else '...' }}")
"""Shows what was said before as dots."""

SAID = (("user", "two plus two?"), ("assistant", "four."), ("user", "three plus one?"), ("assistant", "four again."))


def chatting(here: Path, template: str = TEMPLATE, **config: Any) -> Model:
    tiny.causal(here / "base", **config)
    if template:
        (here / "base" / "chat_template.jinja").write_text(template)
    return load(here / "base")


def said(*messages: tuple[str, str]) -> Chat:
    return Chat(messages=tuple(Message(role, content) for role, content in messages))


def scored(model: Model, record: Chat) -> list[str]:
    """The runs of tokens that are scored, decoded."""
    batch = task_for([record], model.ask(Codec), model.facts).collate([record])
    tokenizer, runs = model.ask(Codec).tokenizer, []
    before = -100
    for label in batch["labels"][0].tolist():
        if label != -100:
            runs += [[]] if before == -100 else []
            runs[-1].append(label)
        before = label
    return [tokenizer.decode(run) for run in runs]


def test_every_turn_of_the_assistant_is_scored_with_its_end_and_nothing_else(tmp_path: Path) -> None:
    model, record = chatting(tmp_path), said(*SAID)
    batch = task_for([record], model.ask(Codec), model.facts).collate([record])
    tokenizer = model.ask(Codec).tokenizer
    whole = "[user] two plus two?\n[assistant] four.</s>\n[user] three plus one?\n[assistant] four again.</s>\n"
    assert batch["input_ids"][0].tolist() == tokenizer("<s>" + whole, add_special_tokens=False)["input_ids"]
    assert scored(model, record) == [" four.</s>", " four again.</s>"]


def test_turns_of_no_weight_are_read_and_not_scored_and_what_follows_the_last_is_left_out(tmp_path: Path) -> None:
    model = chatting(tmp_path)
    [last] = chat.scored([said(*SAID)], "last")
    assert [m.weight for m in last.messages] == [1, 0, 1, 1] or [m.weight for m in last.messages] == [0, 0, 0, 1]
    assert scored(model, last) == [" four again.</s>"]
    assert scored(model, said(*SAID, ("user", "thanks"))) == scored(model, said(*SAID))
    assert chat.scored([said(*SAID)], "all") == [said(*SAID)]


def test_one_turn_is_a_prompt_and_its_completion(tmp_path: Path) -> None:
    """The same ids, labels and loss as the completion record that spells the template out."""
    model, one = chatting(tmp_path), said(*SAID[:2])
    other = Completion(prompt="[user] two plus two?\n[assistant]", completion=" four.")
    batches = [task_for([r], model.ask(Codec), model.facts).collate([r]) for r in (one, other)]
    ids, labels = (batches[1][name] for name in ("input_ids", "labels"))
    length = ids.shape[1]
    assert torch.equal(batches[0]["input_ids"][:, :length], ids)
    assert torch.equal(batches[0]["labels"][:, :length], labels)
    assert (batches[0]["labels"][:, length:] == -100).all()  # the line's end, after the end token
    module = model.ask(Gradients).module()
    losses = [task_for([one], model.ask(Codec), model.facts).loss(forward(module, b), b) for b in batches]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_packed_conversations_lose_what_they_do_apart(tmp_path: Path) -> None:
    model = chatting(tmp_path)
    records = [said(*SAID[:2]), said(*SAID), said(("user", "hi"), ("assistant", "hello there"))]
    task = task_for(records, model.ask(Codec), model.facts)
    rows = packing.packed(records, task.collate, model.facts, 128)
    assert len(rows.rows) < len(records)
    module = model.ask(Gradients).module()
    apart, together = task.collate(records), rows.collate(rows.rows)
    assert int((apart["labels"] != -100).sum()) == int((together["labels"] != -100).sum())
    found = [task.loss(forward(module, batch), batch) for batch in (apart, together)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_too_long_a_conversation_loses_its_beginning_and_never_its_last_turn(tmp_path: Path) -> None:
    model = chatting(tmp_path, max_position_embeddings=24)
    record = said(*SAID)
    batch = task_for([record], model.ask(Codec), model.facts).collate([record])
    assert batch["input_ids"].shape == (1, 24) and batch["input_ids"][0, 0] == 1
    assert scored(model, record)[-1] == " four again.</s>"
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert bool(((labels == ids) | (labels == -100)).all())
    with pytest.raises(DataError, match="does not fit"):
        scored(model, said(("user", "hi"), ("assistant", "word " * 40)))


def test_without_a_template_or_with_one_that_cannot_tell_the_error_says_what_would_work(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no chat template.*chat_template\.jinja.*prompt and completion"):
        scored(chatting(tmp_path / "none", ""), said(*SAID))
    forgets = chatting(tmp_path / "forgets", FORGETS)
    with pytest.raises(DataError, match=r"message 2 otherwise.*turns=last"):
        scored(forgets, said(*SAID))
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"takes no such conversation\. roles must alternate"):
        scored(chatting(tmp_path / "strict", strict), said(*SAID))
    model = load(tiny.masked(tmp_path / "masked"))
    with pytest.raises(DataError, match=r"chat records set no task.*a model for causal-lm"):
        task_for([said(*SAID)], model.ask(Codec), model.facts)


def test_a_turn_that_is_shown_otherwise_later_can_be_learned_as_the_last(tmp_path: Path) -> None:
    forgets = chatting(tmp_path, FORGETS)
    [last] = chat.scored([said(*SAID)], "last")
    with pytest.raises(DataError, match="prompt and completion records"):
        scored(forgets, last)  # here even the question before it is shown otherwise
    thinks = TEMPLATE.replace("{{ m.content }}", "{{ '(hm) ' if loop.last and m.role == 'assistant' }}{{ m.content }}")
    model = chatting(tmp_path / "thinks", thinks)
    with pytest.raises(DataError, match="turns=last"):
        scored(model, said(*SAID))
    assert scored(model, last) == [" (hm) four again.</s>"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_conversations_come_back_from_every_kind_of_file(suffix: str, tmp_path: Path) -> None:
    records = (said(*SAID), *chat.scored([said(*SAID)], "last"))
    write(records, tmp_path / f"a.{suffix}")
    assert read(tmp_path / f"a.{suffix}") == records
    assert digest(records) != digest(records[:1] * 2) and amount(records).tokens > 10


def test_exports_that_say_from_and_value_are_read(tmp_path: Path) -> None:
    line = {"id": "7", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    assert read(tmp_path / "a.jsonl") == (said(("user", "hi"), ("assistant", "hello")),)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "no turn of the assistant"),
        ([{"role": "user", "content": "x"}], "no turn of the assistant"),
        ([{"role": "assistant", "content": " "}], "says nothing"),
        ([{"role": "user"}], r"field `content`.*messages\[0\]"),
        ([{"role": "user", "content": 7}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": "x", "name": "y"}], "unknown field `name`"),
        ("hi", "`messages` must be a list, and is text"),
    ],
)
def test_a_wrong_conversation_is_named_by_file_line_and_field(messages: Any, says: str, tmp_path: Path) -> None:
    right = {"messages": [{"role": "assistant", "content": "hello"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(right) + "\n" + json.dumps({"messages": messages}))
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{says}.*a right line: .*assistant"):
        read(tmp_path / "a.jsonl")


def test_it_is_evaluated_by_the_likelihood_of_its_turns(tmp_path: Path) -> None:
    found = evaluate(chatting(tmp_path), [said(*SAID)] * 3, bootstrap=10)
    assert set(found.metrics) == {"forced_match", "perplexity"} and found.kind == "chat"


def test_with_the_last_turn_alone_a_conversation_keeps_its_line(tmp_path: Path) -> None:
    """An error about it, as of a template that does not take it, still names where it stands."""
    said = (Message("user", "Hi?"), Message("assistant", "Hello."), Message("user", "Two?"), Message("assistant", "2."))
    write([Chat(messages=said)] * 2, tmp_path / "a.jsonl")
    kept = chat.scored(read(tmp_path / "a.jsonl"), "last")
    assert where(kept, 1).endswith("a.jsonl:2")
    assert [m.weight for m in kept[0].messages if m.role == "assistant"] == [0, 1]
