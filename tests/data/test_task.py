"""What records become for a model: the batch, what is scored in it, and how an answer is read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

import tiny
from lfm.core.errors import DataError
from lfm.core.model import Facts
from lfm.data.files import read, where, write
from lfm.data.records import Completion, Edit, Fact, Image, Label, Pair, Text
from lfm.data.task import fit, task_for
from lfm.data.wording import spaced, wording
from lfm.models.codec import ImageCodec, TextCodec

CAUSAL = Facts(task="causal-lm", context=tiny.CONTEXT)
MASKED = Facts(task="masked-lm", context=tiny.CONTEXT)
SEQ2SEQ = Facts(task="seq2seq-lm", context=tiny.CONTEXT)
CODECS = {
    "causal-lm": TextCodec(tiny.byte_bpe()),
    "masked-lm": TextCodec(tiny.word_piece()),
    "seq2seq-lm": TextCodec(tiny.unigram()),
}
WORDS = ("the", "cat", "sat", "on", "mat", "and", "dog", "looked", "at", "paris", "is", "capital")
PARIS = Fact(subject="France", relation="capital", object="Paris", prompt="The capital of France is")


def sure(labels: torch.Tensor, vocabulary: int, task: str) -> torch.Tensor:
    """Logits (B, T, V) of a model that is certain of every label."""
    wanted = labels.clamp(min=0)
    if task == "causal-lm":
        wanted = torch.cat([wanted[:, 1:], wanted[:, :1]], dim=1)
    return 50.0 * F.one_hot(wanted, vocabulary).float()


@pytest.mark.parametrize("facts", [CAUSAL, MASKED, SEQ2SEQ], ids=lambda f: f.task)
@pytest.mark.parametrize(
    "records",
    [
        [PARIS, Fact(subject="Italy", relation="capital", object="Rome", prompt="The capital of Italy is")],
        [
            Completion(prompt="Q: What is two plus two? A:", completion=" four."),
            Completion(prompt="up", completion=" down"),
        ],
        [Edit(subject="x", relation="y", object="Rome", new_object="Berlin", prompt="Ada lives in")],
        [Text(text="The cat sat on the mat."), Text(text="A small model learns a small world.")],
        [Label(text="so good", label="happy"), Label(text="so bad", label="sad")],
        [Pair(text="a cat", text_b="a dog", label="up"), Pair(text="a cat", text_b="a cat", label="down")],
    ],
    ids=["fact", "completion", "edit", "text", "label", "pair"],
)
def test_a_certain_model_loses_nothing_and_predicts_the_truth(facts: Facts, records: list) -> None:
    codec = CODECS[facts.task]
    task = task_for(records, codec, facts)
    batch = task.collate(records)
    if "decoder" not in facts.task and facts.task != "seq2seq-lm":
        assert batch["labels"].shape == batch["input_ids"].shape
    logits = sure(batch["labels"], len(codec.tokenizer), facts.task)
    assert task.loss(logits, batch).item() < 1e-6
    assert task.predict(logits, batch) == task.truth(records)
    scored, labels = task.scored(logits, batch)
    assert scored.shape == (len(labels), len(codec.tokenizer)) and scored.dtype == torch.float32
    assert (labels >= 0).all() and len(labels) > 0


def test_only_the_answer_is_scored() -> None:
    codec = CODECS["causal-lm"]
    batch = task_for([PARIS], codec, CAUSAL).collate([PARIS])
    scored = batch["labels"][0] != -100
    assert codec.tokenizer.decode(batch["labels"][0][scored]) == " Paris"
    assert codec.tokenizer.decode(batch["input_ids"][0][~scored]) == "<s>The capital of France is"


def test_a_completion_ends_with_the_end_token_and_a_fact_does_not() -> None:
    codec = CODECS["causal-lm"]
    said = [Completion(prompt="The capital of France is", completion=" Paris")]
    assert task_for(said, codec, CAUSAL).collate(said)["input_ids"][0, -1] == codec.tokenizer.eos_token_id
    assert task_for([PARIS], codec, CAUSAL).collate([PARIS])["input_ids"][0, -1] != codec.tokenizer.eos_token_id


def test_a_masked_model_reads_masks_in_the_blank_and_the_suffix_after_it() -> None:
    codec = CODECS["masked-lm"]
    fact = Fact(subject="x", relation="y", object="naive", prompt="The café is", suffix=" town.")
    batch = task_for([fact], codec, MASKED).collate([fact])
    words = codec.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    # "naive" is na ##i ##v ##e in the tiny vocabulary: as many masks as tokens.
    assert words[-7:] == ["[MASK]"] * 4 + ["town", ".", "[SEP]"]
    scored = batch["labels"][0] != -100
    assert codec.tokenizer.convert_ids_to_tokens(batch["labels"][0][scored]) == ["na", "##i", "##v", "##e"]


def test_a_merge_across_the_boundary_belongs_to_the_answer() -> None:
    codec = CODECS["causal-lm"]
    record = Completion(prompt="The tow", completion="n")
    batch = task_for([record], codec, CAUSAL).collate([record])
    joint = codec.tokenizer("The town")["input_ids"]
    assert batch["input_ids"][0].tolist() == [*joint, codec.tokenizer.eos_token_id]
    assert "wn" in codec.tokenizer.convert_ids_to_tokens(joint)  # the merge that straddles


@pytest.mark.parametrize(
    ("prompt", "completion"), [("def f():", "    return x"), ("The cat", "\n\n dog"), ("The", "  cat  "), ("a ", " b")]
)
def test_white_space_is_scored_where_offsets_leave_it_out(prompt: str, completion: str) -> None:
    inner = Tokenizer.from_str(tiny.byte_bpe().backend_tokenizer.to_str())
    inner.post_processor = processors.ByteLevel(trim_offsets=True)  # as GPT-2's
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    task = task_for([Completion(prompt=prompt, completion=completion)], TextCodec(tokenizer), CAUSAL)
    batch = task.collate([Completion(prompt=prompt, completion=completion)])
    assert tokenizer.decode(batch["labels"][batch["labels"] != -100]) == completion


LETTERS = st.text(alphabet="abcdefghijklmnopqrstuvwxyz éß東!?. ", max_size=24)


@settings(max_examples=150, deadline=None)
@given(prompt=LETTERS, answer=LETTERS.filter(str.strip))
def test_the_scored_tokens_spell_the_completion(prompt: str, answer: str) -> None:
    codec = CODECS["causal-lm"]
    record = Completion(prompt=prompt, completion=answer)
    labels = task_for([record], codec, CAUSAL).collate([record])["labels"][0]
    spelled = codec.tokenizer.decode(labels[labels != -100], skip_special_tokens=True)
    assert spelled.endswith(answer)
    assert (prompt + answer).endswith(spelled)  # more than the completion only where a token straddles the boundary


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(LETTERS.filter(str.strip), min_size=1, max_size=4))
def test_the_loss_of_a_batch_is_the_mean_over_its_scored_tokens(texts: list[str]) -> None:
    codec = CODECS["causal-lm"]
    records = [Text(text=t) for t in texts]
    task = task_for(records, codec, CAUSAL)
    generator = torch.Generator().manual_seed(0)
    whole = task.collate(records)
    logits = torch.randn(*whole["input_ids"].shape, len(codec.tokenizer), generator=generator)
    total, count = 0.0, 0
    for i, record in enumerate(records):
        alone = task.collate([record])
        n = int((alone["labels"][:, 1:] != -100).sum())
        total += n * task.loss(logits[i : i + 1, : alone["input_ids"].shape[1]], alone).item()
        count += n
    assert task.loss(logits, whole).item() == pytest.approx(total / count, abs=1e-5)


def test_masks_of_running_text_depend_on_the_text_alone() -> None:
    codec = CODECS["masked-lm"]
    records = [Text(text=t) for t in tiny.CORPUS]
    task = task_for(records, codec, MASKED)
    together, alone = task.collate(records), task.collate(records[2:3])
    width = alone["input_ids"].shape[1]
    assert torch.equal(together["input_ids"][2, :width], alone["input_ids"][0])
    assert torch.equal(together["labels"][2, :width], alone["labels"][0])
    shares = [
        (task.collate([r])["labels"] != -100).sum().item() / (len(codec.tokenizer(r.text)["input_ids"]) - 2)
        for r in records
    ]
    assert all(0.1 < share < 0.2 for share in shares)


def test_masked_text_is_mostly_masks() -> None:
    codec = CODECS["masked-lm"]
    records = [
        Text(text=f"{a} {b} {c} dog") for a in tiny._words()[:12] for b in tiny._words()[:12] for c in ("cat", "up")
    ]
    batch = task_for(records, codec, MASKED).collate(records)
    hidden = batch["input_ids"][batch["labels"] != -100] == codec.tokenizer.mask_token_id
    assert hidden.float().mean().item() == pytest.approx(0.8, abs=4 * (0.8 * 0.2 / len(hidden)) ** 0.5)  # 4 sigma


# ------------------------------------------------------------------------------------------ heads


def test_a_classifier_takes_the_order_of_its_config() -> None:
    facts = Facts(task="text-classification", labels=tiny.LABELS)
    records = [Label(text="woof", label="dogs"), Label(text="tweet", label="birds"), Label(text="x", label="0")]
    task = task_for(records, CODECS["masked-lm"], facts)
    batch = task.collate(records)
    assert batch["labels"].tolist() == [1, 2, 0]
    assert task.truth(records) == ["dogs", "birds", "cats"]
    assert task.predict(torch.eye(3)[batch["labels"]], batch) == task.truth(records)
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    assert task.loss(logits, batch).item() == pytest.approx(F.cross_entropy(logits, batch["labels"]).item())


def test_a_pair_marks_its_second_text() -> None:
    facts = Facts(task="text-classification", labels=tiny.LABELS)
    records = [Pair(text="a cat", text_b="a dog", label="cats")]
    batch = task_for(records, CODECS["masked-lm"], facts).collate(records)
    words = CODECS["masked-lm"].tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert words == ["[CLS]", "a", "cat", "[SEP]", "a", "dog", "[SEP]"]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_an_unknown_class_is_named_with_the_known_ones() -> None:
    facts = Facts(task="text-classification", labels=tiny.LABELS)
    records = [Label(text="moo", label="cows")]
    with pytest.raises(DataError, match=r"'cows' is not one of .*cats, dogs, birds"):
        task_for(records, CODECS["masked-lm"], facts).collate(records)


def test_images_become_pixels(tmp_path: Path) -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(tiny.vit(tmp_path), backend="pil")
    facts = Facts(task="image-classification", labels=tiny.DIGITS)
    records = [Image(image=np.full((8, 8), 17 * i, np.uint8), label=str(i)) for i in range(3)]
    task = task_for(records, ImageCodec(processor), facts)
    batch = task.collate(records)
    assert batch["pixel_values"].shape == (3, 3, 8, 8) and batch["labels"].tolist() == [0, 1, 2]
    assert task.truth(records) == ["0", "1", "2"]
    # The processor rescales by 1/255 and normalises with mean and deviation 0.5.
    assert batch["pixel_values"][1].unique().item() == pytest.approx(2 * 17 / 255 - 1, abs=1e-6)


# ------------------------------------------------------------------------------------------ classes in words


def test_named_classes_are_read_by_greedy_decoding_over_the_names() -> None:
    codec = CODECS["causal-lm"]
    records = [Label(text="so", label=name) for name in ("cats", "cat", "dogs")]
    task = task_for(records, codec, CAUSAL)
    batch = task.collate(records)
    ids = {name: codec.tokenizer(" " + name, add_special_tokens=False)["input_ids"] for name in ("cats", "cat", "dogs")}
    logits = torch.zeros(*batch["input_ids"].shape, len(codec.tokenizer))
    at = (batch["labels"][0] != -100).nonzero()[0].item() - 1
    logits[:, at, ids["dogs"][0]] = 1.0
    assert task.predict(logits, batch) == ["dogs"] * 3
    logits[:, at, ids["cat"][0]] = 2.0  # the likelier first token of cats and cat; the token after it parts them
    assert task.predict(logits, batch)[2] in ("cat", "cats")
    after = {len(ids["cat"]): codec.tokenizer.eos_token_id}
    for place, token in after.items():
        logits[:, at + place, token] = 3.0
    assert task.predict(logits, batch)[1] == "cat"
    assert task.predict(logits, batch)[0] == "cat"


def test_a_masked_model_compares_names_of_one_length() -> None:
    codec = CODECS["masked-lm"]
    uneven = [Label(text="so", label="happy"), Label(text="so", label="naive")]
    with pytest.raises(DataError, match="names of one length"):
        task_for(uneven, codec, MASKED)


# ------------------------------------------------------------------------------------------ length


def test_a_long_prompt_loses_its_beginning_and_never_its_answer() -> None:
    codec = CODECS["causal-lm"]
    record = Completion(prompt="The cat sat on the mat. " * 60, completion="Then the dog looked.")
    batch = task_for([record], codec, CAUSAL).collate([record])
    assert batch["input_ids"].shape == (1, tiny.CONTEXT)
    assert batch["input_ids"][0, 0] == codec.tokenizer.bos_token_id
    scored = batch["labels"][0] != -100
    spelled = codec.tokenizer.decode(batch["labels"][0][scored], skip_special_tokens=True)
    assert spelled.strip() == "Then the dog looked."
    endless = Completion(prompt="Go:", completion=" dog" * 200)
    with pytest.raises(DataError, match=f"does not fit the model's context of {tiny.CONTEXT}"):
        task_for([endless], codec, CAUSAL).collate([endless])


@pytest.mark.parametrize("facts", [CAUSAL, MASKED, SEQ2SEQ], ids=lambda f: f.task)
def test_a_long_text_is_cut_by_collate_and_split_by_fit(facts: Facts) -> None:
    codec = CODECS[facts.task]
    long = Text(text="the cat sat on the mat and the dog looked at the cat. " * 30, group="g")
    task = task_for([long], codec, facts)
    assert task.collate([long])["input_ids"].shape[1] <= tiny.CONTEXT
    pieces = fit([long], codec, facts)
    assert len(pieces) > 2 and {p.group for p in pieces} == {"g"}
    assert "".join(p.text for p in pieces) == long.text
    lengths = [len(codec.tokenizer(p.text)["input_ids"]) for p in pieces]
    assert max(lengths) <= tiny.CONTEXT
    assert fit([PARIS], codec, facts) == (PARIS,)


def test_a_piece_is_found_where_its_text_was_read(tmp_path: Path) -> None:
    write([Text(text="the cat"), Text(text="the cat sat on the mat. " * 60)], tmp_path / "texts.jsonl")
    pieces = fit(read(tmp_path / "texts.jsonl"), CODECS["causal-lm"], CAUSAL)
    lines = [where(pieces, place).rpartition(":")[2] for place in range(len(pieces))]
    assert len(pieces) > 3 and lines == ["1"] + ["2"] * (len(pieces) - 1)


# ------------------------------------------------------------------------------------------ what cannot be taken


@pytest.mark.parametrize(
    ("records", "facts", "says"),
    [
        ([], CAUSAL, "no records"),
        ([PARIS, Text(text="x")], CAUSAL, "several kinds at once: text 2 among fact records"),
        ([Image(image="x.png", label="1")], CAUSAL, "set no task.*a model for image-classification"),
        ([PARIS], Facts(task="text-classification"), "set no task.*records of kind label or pair"),
        ([PARIS], Facts(task="encoder"), "it has no language-modelling or classification head"),
        ([Label(text="x", label="y")], Facts(task="image-classification"), "set no task"),
    ],
)
def test_records_that_set_a_model_no_task_are_refused(records: list, facts: Facts, says: str) -> None:
    with pytest.raises(DataError, match=says):
        task_for(records, CODECS["causal-lm"], facts)


@pytest.mark.parametrize(
    ("prompt", "answer", "joined"),
    [
        ("The capital is", "Paris", "The capital is Paris"),
        ("The capital is ", "Paris", "The capital is Paris"),
        ("He said “", "yes", "He said “yes"),
        ("", "Paris", "Paris"),
        ("日本の首都は", "東京", "日本の首都は東京"),
        ("price: $", "5", "price: $5"),
        ("The capital is", " Paris", "The capital is Paris"),
    ],
)
def test_answers_are_spaced_as_in_running_text(prompt: str, answer: str, joined: str) -> None:
    assert prompt + spaced(prompt, answer) == joined


def test_an_edit_asks_for_the_new_object() -> None:
    edit = Edit(subject="x", relation="y", object="Rome", new_object="Berlin", prompt="Ada lives in")
    assert wording(edit) == ("Ada lives in", " Berlin", ".")
    with pytest.raises(DataError, match="kind text asks for no answer"):
        wording(Text(text="x"))
