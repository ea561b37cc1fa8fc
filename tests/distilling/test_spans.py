"""Two tokenizers on one text: spans that cover it, whatever the tokenizers are."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tiny
from lfm.core import Codec, Facts
from lfm.core.errors import MismatchError
from lfm.data import records as data
from lfm.data.task import task_for
from lfm.distilling import spans
from lfm.models.codec import TextCodec

TEXT = st.text(st.sampled_from("the cat sat on a mat, Paris naïve 東京“”\n  é"), min_size=1, max_size=40)


@cache
def bytes_of_characters() -> Any:
    """A byte-level tokenizer without merges: every byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@cache
def pieces() -> Any:
    """SentencePiece-like: ▁ for spaces and before the text, and bytes for what it does not know."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    known = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁thecasonmPri", "▁t", "▁th", "▁the", "at"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("a", "t")]
    model = models.BPE(
        {t: i for i, t in enumerate(known)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


MADE = {
    "bpe": tiny.byte_bpe,
    "bytes": bytes_of_characters,
    "pieces": pieces,
    "unigram": tiny.unigram,
    "words": tiny.word_piece,
}
LOSSLESS = ("bpe", "bytes", "pieces")


@cache
def tokenizer(name: str) -> Any:
    return MADE[name]()


def reading(record: Any, name: str, context: int = 0) -> spans.Reading:
    facts = Facts(task="causal-lm", context=context)
    return spans.read(record, task_for([record], TextCodec(tokenizer(name)), facts), tokenizer(name))


def said(read: spans.Reading, name: str, first: int, last: int) -> bytes:
    return b"".join(spans.spellings(tokenizer(name))[i] or b"" for i in read.ids[first:last])


@settings(deadline=None, max_examples=60)
@given(text=TEXT, names=st.tuples(st.sampled_from(LOSSLESS), st.sampled_from(LOSSLESS)))
def test_spans_cover_the_text_exactly_and_say_the_same_bytes(text: str, names: tuple[str, str]) -> None:
    record = data.Text(text=text)
    ours, theirs = (reading(record, name) for name in names)
    found = spans.align(ours, theirs)
    for a, b in itertools.pairwise(found):
        assert a.ours[1] == b.ours[0] and a.theirs[1] == b.theirs[0]
    if found:
        assert found[-1].ours[1] == len(ours.ids) and found[-1].theirs[1] == len(theirs.ids)
    for span in found:
        assert said(ours, names[0], *span.ours) == said(theirs, names[1], *span.theirs) != b""
        inner = [set(read.keys[a : b - 1]) for read, (a, b) in ((ours, span.ours), (theirs, span.theirs))]
        assert not inner[0] & inner[1], "a finer partition was there"


@settings(deadline=None, max_examples=30)
@given(text=TEXT, name=st.sampled_from(sorted(MADE)))
def test_a_tokenizer_is_aligned_with_itself_token_by_token(text: str, name: str) -> None:
    read = reading(data.Text(text=text), name)
    found = spans.align(read, read)
    assert all(span.ours == span.theirs for span in found)
    if name in LOSSLESS:
        assert all(span.single for span in found)
        assert len(found) == len(read.ids) - 1  # nothing tells the first one


@settings(deadline=None, max_examples=30)
@example(text=" ", name="words")  # no token but those around it
@given(text=TEXT, name=st.sampled_from(sorted(set(MADE) - set(LOSSLESS))))
def test_tokenizers_that_change_the_text_are_aligned_by_its_characters(text: str, name: str) -> None:
    """The words of WordPiece (which folds case) and Unigram (which does not know every letter) end where others' do."""
    record = data.Text(text=text)
    ours, theirs = reading(record, name), reading(record, "bytes")
    whole = text.encode()
    for span in spans.align(ours, theirs):
        key = ours.keys[span.ours[1] - 1]
        assert key is not None
        if key[1] != spans.END:
            last = theirs.ids[span.theirs[1] - 1]
            assert spans.spellings(tokenizer("bytes"))[last] == whole[key[1] - 1 : key[1]]


@pytest.mark.parametrize("names", [("bpe", "pieces"), ("words", "bpe"), ("unigram", "bytes")])
def test_a_completion_is_compared_from_its_beginning_to_the_token_that_ends_it(names: tuple[str, str]) -> None:
    record = data.Completion(prompt="Paris is the capital of", completion=" France and the cat sat")
    ours, theirs = (reading(record, name) for name in names)
    found = spans.align(ours, theirs)
    first, last = found[0], found[-1]
    ends = tokenizer(names[0]).eos_token_id  # WordPiece has none
    assert ends is None or (last.single and ours.ids[last.ours[0]] == ends)
    told = said(theirs, names[1], first.theirs[0], len(theirs.ids))
    assert told.endswith(b" France and the cat sat") and len(told) <= len(" France and the cat sat") + 6
    assert ours.labels[first.ours[0]] != -100


def test_a_prompt_that_loses_its_beginning_changes_nothing_of_the_answer() -> None:
    record = data.Completion(prompt="the cat sat on the mat " * 5, completion=" and Paris")
    cut, whole = reading(record, "bpe", 24), reading(record, "bpe")
    assert len(cut.ids) < len(whole.ids)
    ours, theirs = ([r.ids[s.theirs[0]] for s in spans.align(whole, r)] for r in (cut, whole))
    assert ours == theirs


def test_conversations_are_aligned_by_what_is_said_whatever_the_templates() -> None:
    record = data.Chat(
        messages=(
            data.Message("user", "the cat?"),
            data.Message("assistant", "the mat"),
            data.Message("user", "Paris?"),
            data.Message("assistant", "on the mat, naïve"),
        )
    )
    asked = "{%% if add_generation_prompt %%}%s{%% endif %%}"
    templates = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}" + asked % "assistant: ",
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>\n{% endfor %}" + asked % "[assistant]",
    )
    found = []
    for name, template in zip(("bytes", "pieces"), templates, strict=True):
        made = MADE[name].__wrapped__()  # type: ignore[attr-defined]
        made.chat_template = template
        task = task_for([record], TextCodec(made), Facts(task="causal-lm"))
        found.append((made, spans.read(record, task, made)))
    (one, ours), (two, theirs) = found
    some = spans.align(ours, theirs)
    told = [one.decode(ours.ids[a:b]) for a, b in (span.ours for span in some)]
    assert "".join(told).replace("</s>", "|") == "the mat|on the mat, naïve|"
    assert [one.decode(ours.ids[a:b]) for a, b in (s.ours for s in some)] == [
        two.decode(theirs.ids[a:b], clean_up_tokenization_spaces=False) for a, b in (s.theirs for s in some)
    ]


def test_classes_share_what_is_spelled_alike_and_give_the_rest_to_its_beginning() -> None:
    ours, theirs = tokenizer("bytes"), tokenizer("bpe")
    sizes = (len(ours), len(theirs) + 3)
    found = spans.classes(ours, theirs, sizes)
    mine, others = spans.spellings(ours), spans.spellings(theirs)
    by_class = {found.ours[i]: piece for i, piece in enumerate(mine) if piece is not None}
    for id, piece in enumerate(others):
        if piece is not None:  # every byte is a token of ours
            assert by_class[found.theirs[id]] == piece[:1]
    assert found.ours[ours.eos_token_id] == found.theirs[theirs.eos_token_id] != found.many - 1
    assert found.theirs[len(theirs) :] == [found.many - 1] * 3 == [found.theirs[theirs.pad_token_id]] * 3
    # of two beginnings that both have, the longer
    long, id = next((piece, i) for i, piece in enumerate(others) if piece and len(piece) > 2 and piece[:2] in others)
    more = copy.deepcopy(tokenizer("bytes"))
    more.add_tokens([long[:2].decode()])
    longer = spans.classes(more, theirs, (len(more), len(theirs)))
    assert longer.theirs[id] == longer.ours[-1] != longer.ours[mine.index(long[:1])]
    same = spans.classes(theirs, theirs, (len(theirs), len(theirs)))
    assert same.ours == same.theirs and len(set(same.ours)) == len(theirs)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(MismatchError, match="where its tokens begin"):
        spans.spellings(object())


def test_real_vocabularies_spell_what_they_read(tmp_path: Path) -> None:
    from lfm.models import load

    codec = load(tiny.causal(tmp_path)).ask(Codec)
    text = " ".join(tiny.CORPUS)
    ids = codec.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(spans.spellings(codec.tokenizer)[i] or b"" for i in ids) == text.encode()
