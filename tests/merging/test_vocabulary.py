"""Tables of tokens brought to one vocabulary, and the tokenizer that goes with them."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lfm.cli import run
from lfm.merging.recipe import FromModel, Token, Zero
from lfm.merging.vocabulary import ABSENT, UNUSED, Aligned, Vocabulary, aligned, takes_of
from lfm.tensors.lazy import AsStored, Held


def vocabulary(**more: object) -> Vocabulary:
    """a has x, y, z; b has y, w in other places; the result has x, y, z, w and two rows that are no token's."""
    told = {"tokens": {"x": 0, "y": 1, "z": 2, "w": 3}, "of": {"a": {"x": 0, "y": 1, "z": 2}, "b": {"w": 0, "y": 1}}}
    return Vocabulary(**{"told": {}, "rows": 6, "base": "", **told, **more})  # type: ignore[arg-type]


A = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
B = torch.tensor([[-4.0, -40.0], [-2.0, -20.0]])


def tables(vocabulary: Vocabulary) -> dict[str, torch.Tensor]:
    return {name: t.read() for name, t in aligned(vocabulary, {"a": Held(A), "b": Held(B)}).items()}


def test_rows_move_with_their_tokens_and_a_token_of_one_model_is_its_row_in_all() -> None:
    made = tables(vocabulary())
    assert made["a"][:4].tolist() == [[1, 10], [2, 20], [3, 30], [-4, -40]]
    assert made["b"][:4].tolist() == [[1, 10], [-2, -20], [3, 30], [-4, -40]]


def test_rows_of_no_token_are_the_mean_of_the_others() -> None:
    made = tables(vocabulary())
    for table in made.values():
        torch.testing.assert_close(table[4:], table[:4].mean(0).expand(2, 2))


def test_what_several_have_is_the_bases_or_else_their_mean() -> None:
    of = {"a": {"x": 0}, "b": {"x": 1}, "c": {}}
    both = Vocabulary({"x": 0}, of, {}, 1, "")
    given = {"a": Held(A), "b": Held(B), "c": Held(torch.zeros(0, 2))}
    assert aligned(both, given)["c"].read().tolist() == [[-0.5, -5.0]]
    assert aligned(both._replace(base="b"), given)["c"].read().tolist() == [[-2.0, -20.0]]


def test_what_the_recipe_says_of_a_token() -> None:
    told = {
        "x": Token(Zero()),  # a has it: only b gets zeros
        "y": Token(FromModel("b", token="w"), force=True),
        "z": Token("a", force=True),
        "w": Token(FromModel("a", token_id=2)),
    }
    made = tables(vocabulary(told=told, rows=4))
    assert made["a"].tolist() == [[1, 10], [-4, -40], [3, 30], [3, 30]]
    assert made["b"].tolist() == [[0, 0], [-4, -40], [3, 30], [-4, -40]]


def test_a_bias_has_a_number_for_each_token() -> None:
    made = aligned(vocabulary(rows=4), {"a": Held(A[:, 0].contiguous()), "b": Held(B[:, 0].contiguous())})
    assert made["b"].read().tolist() == [1, -2, 3, -4]


@given(st.data())
@settings(max_examples=40)
def test_any_part_reads_as_the_whole_does(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    take = np.array(data.draw(st.lists(st.lists(st.sampled_from([ABSENT, 0, 1, 2]), min_size=rows, max_size=rows),
                                       min_size=2, max_size=2)))  # fmt: skip
    take[:, data.draw(st.lists(st.integers(0, rows - 1), max_size=2))] = UNUSED
    random = torch.Generator().manual_seed(0)
    given_ = tuple(AsStored(Held(torch.randn(3, width, generator=random).bfloat16()), "BF16") for _ in range(2))
    table = Aligned(given_, take, "F32")
    whole = table.read().reshape(-1)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    part = torch.empty(stop - start)
    table.read_into(memoryview(part.view(torch.uint8).numpy().data), start * 4)  # type: ignore[arg-type]
    assert torch.equal(part, whole[start:stop])
    sources = [t.tensor.read().double() for t in given_]
    for row in range(rows):
        have = [sources[t][take[t, row]] for t in range(2) if take[t, row] >= 0]
        if take[0, row] != UNUSED:
            mean = torch.stack(have).mean(0).float() if have else torch.zeros(width)
            assert torch.equal(whole.reshape(rows, width)[row], mean)


def test_rows_that_a_table_lacks_count_as_tokens_it_does_not_have() -> None:
    takes = takes_of(vocabulary(rows=4), {"a": 2, "b": 2})
    assert takes["a"][:, 2].tolist() == [ABSENT, ABSENT]


def model(here: Path, name: str, tokens: list[str], seed: int, rows: int = 0, added: tuple[str, ...] = ()) -> None:
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(list(added))
    tokenizer.chat_template = "{% for m in messages %}" + name + ":{{ m['content'] }};{% endfor %}"
    tokenizer.save_pretrained(here / name)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows or len(tokenizer), hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16, bos_token_id=tokens.index("<s>"),
        eos_token_id=tokens.index("</s>"),
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(here / name)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three models: `base`; `more`, with a token added; `other`, with some of the tokens in other places."""
    monkeypatch.chdir(tmp_path)
    model(tmp_path, "base", ["<s>", "</s>", "a", "b", "c"], 0)
    model(tmp_path, "more", ["<s>", "</s>", "a", "b", "c"], 1, added=("<tool>",))
    model(tmp_path, "other", ["d", "c", "</s>", "b", "<s>"], 2)
    return tmp_path


def merged(recipe: str) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    Path("recipe.yml").write_text(dedent(recipe))
    assert run(["merge", "recipe.yml", "out"]) == 0
    return LlamaForCausalLM.from_pretrained("out"), AutoTokenizer.from_pretrained("./out")


def rows(name: str, head: bool = False) -> dict[str, torch.Tensor]:
    """A model's rows by token."""
    made = LlamaForCausalLM.from_pretrained(name)
    table = made.lm_head.weight if head else made.model.embed_tokens.weight
    return {token: table[i].detach() for token, i in AutoTokenizer.from_pretrained(f"./{name}").get_vocab().items()}


TWO = """
    models:
      - {model: ./base, parameters: {weight: 1}}
      - {model: ./other, parameters: {weight: 3}}
    merge_method: linear
    base_model: ./base
"""


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("source", ["union", "base", "./other"])
def test_each_token_is_merged_with_itself(here: Path, source: str, head: bool) -> None:
    merged(TWO + f"    tokenizer_source: {source}")
    base, other, made = (rows(name, head) for name in ("base", "other", "out"))
    assert made.keys() == {"union": base.keys() | other.keys(), "base": base.keys(), "./other": other.keys()}[source]
    for token, row in made.items():
        mine, theirs = base.get(token, other.get(token)), other.get(token, base.get(token))
        assert mine is not None and theirs is not None
        torch.testing.assert_close(row, (mine + 3 * theirs) / 4)


def test_added_tokens_padding_and_the_ids_of_special_tokens(here: Path) -> None:
    model, tokenizer = merged(
        """
        models: [{model: ./more, parameters: {weight: 1}}, {model: ./other, parameters: {weight: 1}}]
        merge_method: task_arithmetic
        base_model: ./base
        tokenizer: {source: union, pad_to_multiple_of: 8, tokens: {<new>: {source: {kind: zero}}}}
        """
    )
    assert tokenizer.encode("ab<tool><new>") == [2, 3, *(tokenizer.get_vocab()[t] for t in ("<tool>", "<new>"))]
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == 8
    assert not model.model.embed_tokens.weight[tokenizer.get_vocab()["<new>"]].any()
    other = merged_by(here, "./other")
    assert (other.config.bos_token_id, other.config.eos_token_id) == (4, 2)


def merged_by(here: Path, source: str) -> LlamaForCausalLM:
    Path("again.yml").write_text(dedent(TWO) + f"tokenizer_source: {source}\n")
    assert run(["merge", "again.yml", "again"]) == 0
    return LlamaForCausalLM.from_pretrained("again")


def test_rows_that_belong_to_no_token_go(here: Path) -> None:
    model(here, "padded", ["<s>", "</s>", "a", "b", "c"], 3, rows=16)
    recipe = "models: [{model: ./base, parameters: {weight: 1}}, {model: ./padded, parameters: {weight: 1}}]\n"
    made, _ = merged(recipe + "merge_method: linear\ntokenizer_source: base")
    assert made.config.vocab_size == made.lm_head.weight.shape[0] == 5


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("chatml", "<|im_start|>user\nhi<|im_end|>\n"),
        ("'{% for m in messages %}<{{ m.content }}>{% endfor %}'", "<hi>"),
        ("auto", "base:hi;"),
    ],
)
def test_chat_templates(here: Path, asked: str, says: str) -> None:
    _, tokenizer = merged(TWO + f"    tokenizer_source: base\n    chat_template: {asked}")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == says


def test_without_a_tokenizer_the_vocabularies_must_agree(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yml").write_text(dedent(TWO).replace("other", "more"))
    assert run(["merge", "recipe.yml", "out"]) != 0
    assert "add tokenizer_source: union" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("asked", ["nothing", "alpaca and more"])
def test_a_template_that_is_none(here: Path, asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yml").write_text(dedent(TWO) + f"tokenizer_source: base\nchat_template: {asked}\n")
    assert run(["merge", "recipe.yml", "out"]) != 0
    assert "a Jinja template" in capsys.readouterr().err
