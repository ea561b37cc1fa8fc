"""Any Hugging Face directory, as the set of interfaces it gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lfm
import tiny
from lfm.core import Codec, Embeddings, Features, Gradients, Injection, Logits, Logprobs, Model, Text, Vectors, Weights
from lfm.core.errors import AccessError, CorruptError, MismatchError, ModelError, UnsafeError
from lfm.models import structure
from lfm.models.language import BATCH_TOKENS, CausalText

READING = {Codec, Features, Gradients, Logits, Vectors, Weights}
GIVES = {
    tiny.causal: ("causal-lm", READING | {Text, Logprobs, Embeddings, Injection}),
    tiny.masked: ("masked-lm", READING | {Logprobs, Embeddings, Injection}),
    tiny.seq2seq: ("seq2seq-lm", READING - {Vectors} | {Text, Logprobs, Embeddings, Injection}),
    tiny.classifier: ("text-classification", READING),
    tiny.vit: ("image-classification", READING - {Vectors}),
    tiny.encoder: ("encoder", READING - {Logits}),
}
PROMPTS = ["the cat sat on", "Paris is the capital", "Q: What is"]


def batch_of(model: Model) -> dict[str, torch.Tensor]:
    codec = model.ask(Codec)
    if model.facts.task == "image-classification":
        return dict(codec.images([np.full((9, 9), 7, np.uint8), np.arange(300, dtype=np.uint8).reshape(10, 10, 3)]))
    batch = dict(codec.texts(PROMPTS))
    if model.facts.task == "seq2seq-lm":
        batch["decoder_input_ids"] = batch["input_ids"][:, :2]
    return batch


@pytest.mark.parametrize("make", GIVES, ids=lambda make: make.__name__)
def test_what_a_checkpoint_gives_follows_from_its_architecture(make: Callable[..., Path], tmp_path: Path) -> None:
    model = lfm.load(make(tmp_path / "m"))
    task, gives = GIVES[make]
    assert model.facts.task == task
    assert set(model.gives) == gives
    for kind in gives:
        model.ask(kind)
    pictures = batch_of(model).get("pixel_values", torch.empty(0, 0))
    assert model.facts.image == (tuple(pictures.shape[1:]) if task == "image-classification" else ())


@pytest.mark.parametrize("height", [1, 3, 4])
def test_the_rows_of_a_picture_are_never_taken_for_its_channels(height: int, tmp_path: Path) -> None:
    """A black picture with one white column, whatever its height: by the processor's own rescaling, −1 but for +1."""
    codec = lfm.load(tiny.vit(tmp_path / "m")).ask(Codec)
    image = np.zeros((height, 8, 3), np.uint8)
    image[:, 5] = 255
    told = codec.images([image])["pixel_values"][0]
    want = torch.full((3, 8, 8), -1.0)
    want[:, :, 5] = 1.0
    assert torch.equal(told, want)


@pytest.mark.parametrize("make", GIVES, ids=lambda make: make.__name__)
def test_rewrapping_an_unchanged_module_changes_nothing(make: Callable[..., Path], tmp_path: Path) -> None:
    model = lfm.load(make(tmp_path / "m"))
    again = model.ask(Gradients).rewrap(model.ask(Gradients).module())
    assert again.digest == model.digest
    (tmp_path / "out").mkdir()
    again.save(tmp_path / "out")
    assert lfm.load(tmp_path / "out").digest == model.digest
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("m", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("make", [m for m in GIVES if m is not tiny.encoder], ids=lambda make: make.__name__)
def test_logits_are_those_of_transformers(make: Callable[..., Path], tmp_path: Path) -> None:
    model = lfm.load(make(tmp_path / "m"))
    plain = getattr(transformers, model.facts.architecture).from_pretrained(tmp_path / "m").eval()
    batch = batch_of(model)
    with torch.inference_mode():
        assert torch.equal(model.ask(Logits).logits(batch), plain(**batch).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_is_opened_in_fp32_and_saved_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny.causal(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    model = lfm.load(tmp_path / "m")
    module = model.ask(Gradients).module()
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert model.ask(Gradients).rewrap(module).digest == model.digest
    assert model.facts.dtype == str(dtype).removeprefix("torch.")


def test_shards_are_the_same_model(tmp_path: Path) -> None:
    tiny.causal(tmp_path / "m")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").save_pretrained(
        tmp_path / "s", max_shard_size="20KB"
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / "s" / name).write_bytes((tmp_path / "m" / name).read_bytes())
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 1
    one, many = lfm.load(tmp_path / "m"), lfm.load(tmp_path / "s")
    assert one.digest == many.digest
    assert torch.equal(one.ask(Logits).logits(batch_of(one)), many.ask(Logits).logits(batch_of(one)))


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = lfm.load(tiny.causal(tmp_path / "m", tie_word_embeddings=True))
    assert "lm_head.weight" not in model.ask(Weights).tensors()
    module = model.ask(Gradients).module()
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight  # type: ignore[operator]
    assert model.ask(Gradients).rewrap(module).digest == model.digest


def test_an_unknown_architecture_gives_weights_and_says_why_no_more(tmp_path: Path) -> None:
    tiny.causal(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"architectures": ["NovelForCausalLM"], "auto_map": {"AutoModel": "x.Novel"}}))
    model = lfm.load(tmp_path / "m")
    assert set(model.gives) == {Weights}
    assert model.ask(Weights).tensors()
    with pytest.raises(AccessError, match=r"NovelForCausalLM.*never run"):
        model.ask(Logits)


def test_a_bare_state_dict_takes_a_module_given_in_python(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    save_file(module.state_dict(), tmp_path / "net.safetensors")
    assert set(lfm.load(tmp_path / "net.safetensors").gives) == {Weights}

    def build() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))

    model = lfm.load(tmp_path / "net.safetensors", module=build)
    x = torch.randn(4, 3)
    assert torch.equal(model.ask(Logits).logits({"x": x}), module(x))
    (tmp_path / "out").mkdir()
    model.ask(Gradients).rewrap(model.ask(Gradients).module()).save(tmp_path / "out")
    assert lfm.load(tmp_path / "out", module=build).digest == model.digest
    with pytest.raises(MismatchError, match="does not fit"):
        lfm.load(tmp_path / "net.safetensors", module=lambda: torch.nn.Linear(3, 5)).ask(Logits).logits({"x": x})


def test_generation_with_a_cache_and_without_is_the_same(tmp_path: Path) -> None:
    model = lfm.load(tiny.causal(tmp_path / "m"))
    cached = model.ask(Text).generate(PROMPTS, max_tokens=12)
    plain = CausalText(model.ask(Logits).logits, model.ask(Codec)).generate(PROMPTS, max_tokens=12)
    assert cached == plain
    stop = cached[0][2:4]
    assert model.ask(Text).generate(PROMPTS[:1], max_tokens=12, stop=[stop]) == [cached[0].split(stop)[0]]


def test_sampling_is_keyed_by_the_seed(tmp_path: Path) -> None:
    text = lfm.load(tiny.causal(tmp_path / "m")).ask(Text)
    first, again, other = (text.generate(PROMPTS, max_tokens=12, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert first == again != other


def test_one_prompt_asked_often_is_answered_in_as_many_ways_however_many_batches_it_takes(tmp_path: Path) -> None:
    text = lfm.load(tiny.causal(tmp_path / "m")).ask(Text)
    count = BATCH_TOKENS // 20
    told = text.generate(["the cat"] * 2 * count, max_tokens=24, temperature=1.0)
    assert len(set(told[:count]) & set(told[count:])) < count / 4


def test_a_linked_file_goes_by_the_links_name(tmp_path: Path) -> None:
    """As in the hub's cache, where files are links to blobs without a suffix."""
    directory = tiny.causal(tmp_path / "m")
    blob = (directory / "model.safetensors").rename(tmp_path / "blob")
    (directory / "model.safetensors").symlink_to(blob)
    (tmp_path / "bare.safetensors").symlink_to(blob)
    assert lfm.load(tmp_path / "bare.safetensors").ask(Weights).tensors().keys() == load_file(blob).keys()
    assert lfm.load(directory).ask(Logits)


def test_scores_are_the_logits_of_the_continuation(tmp_path: Path) -> None:
    model = lfm.load(tiny.causal(tmp_path / "m"))
    (score,) = model.ask(Logprobs).score(["the cat sat"], [" on the mat"])
    ids = model.ask(Codec).texts(["the cat sat on the mat"])
    logits = model.ask(Logits).logits(ids)[0].log_softmax(-1)
    row = ids["input_ids"][0]
    n = len(score.logprobs)
    expected = [float(logits[i - 1, row[i]]) for i in range(len(row) - n, len(row))]
    assert score.logprobs == pytest.approx(expected, abs=1e-5)


def test_a_batch_of_many_lengths_scores_as_each_alone(tmp_path: Path) -> None:
    for make in (tiny.causal, tiny.masked, tiny.seq2seq):
        logprobs = lfm.load(make(tmp_path / make.__name__)).ask(Logprobs)
        words = [" cat", " of France", " two"]
        together = logprobs.score(PROMPTS, words, ["."] * 3)
        alone = [logprobs.score([p], [w], ["."])[0] for p, w in zip(PROMPTS, words)]
        assert [s.total for s in together] == pytest.approx([s.total for s in alone], abs=1e-4)
        assert [s.tokens for s in together] == [s.tokens for s in alone]


def test_next_from_embeddings_is_next_from_text(tmp_path: Path) -> None:
    model = lfm.load(tiny.causal(tmp_path / "m"))
    embeddings = model.ask(Embeddings)
    from_text = model.ask(Logprobs).top(PROMPTS, 5)
    from_embeds = embeddings.next_from(embeddings.embed(PROMPTS), 5)
    for x, y in zip(from_text, from_embeds, strict=True):
        assert [w for w, _ in x] == [w for w, _ in y]
        assert [p for _, p in x] == pytest.approx([p for _, p in y], abs=1e-4)


def test_features_at_a_site_are_what_the_layer_reads(tmp_path: Path) -> None:
    model = lfm.load(tiny.causal(tmp_path / "m"))
    module = model.ask(Gradients).module()
    ffn = structure.feed_forward(module, structure.blocks(module)[-1])
    key, out = model.ask(Features).features(batch_of(model), [("ffn_key", -1), ("ffn_out", -1)])
    down = module.get_submodule(ffn.down)
    torch.testing.assert_close(down(key), out, rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="no block 9"):
        model.ask(Features).features(batch_of(model), [("hidden", 9)])


def test_replacing_a_tensor_by_another_shape_or_name_is_refused(tmp_path: Path) -> None:
    weights = lfm.load(tiny.causal(tmp_path / "m")).ask(Weights)
    name = next(iter(weights.tensors()))
    with pytest.raises(MismatchError, match="no tensor"):
        weights.replace({"novel": torch.zeros(1)})
    with pytest.raises(MismatchError, match=name):
        weights.replace({name: torch.zeros(1)})


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    tiny.causal(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(UnsafeError, match="pickle"):
        lfm.load(tmp_path / "m").ask(Weights).tensors()


def test_a_config_that_is_not_json_names_the_file(tmp_path: Path) -> None:
    tiny.causal(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(CorruptError, match=r"config\.json"):
        lfm.load(tmp_path / "m")


def test_weights_of_another_architecture_are_refused_not_dropped(tmp_path: Path) -> None:
    tiny.causal(tmp_path / "m")
    tiny.causal(tmp_path / "n", num_hidden_layers=1)
    (tmp_path / "n" / "config.json").write_bytes((tmp_path / "m" / "config.json").read_bytes())
    with pytest.raises(MismatchError, match="missing"):
        lfm.load(tmp_path / "n").ask(Logits).logits({})


def test_a_reference_to_nothing_says_what_is_near(tmp_path: Path) -> None:
    tiny.causal(tmp_path / "model-a")
    with pytest.raises(ModelError, match="model-a"):
        lfm.load(tmp_path / "model-b")


def changed(directory: Path, **values: object) -> Path:
    """The directory with other values in its config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return directory


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", "big"), ("num_attention_heads", {"x": 1}), ("id2label", {"a": 1})]
)
def test_a_config_value_of_the_wrong_kind_is_named(key: str, value: object, tmp_path: Path) -> None:
    model = lfm.load(changed(tiny.causal(tmp_path / "m"), **{key: value}))
    with pytest.raises(CorruptError, match=key):
        model.facts  # noqa: B018


def test_sizes_that_disagree_with_the_config_are_told(tmp_path: Path) -> None:
    model = lfm.load(changed(tiny.causal(tmp_path / "m"), vocab_size=7))
    with pytest.raises(MismatchError) as told:
        model.ask(Gradients).module()
    assert "embed_tokens" in str(told.value) and "where config.json asks for [7," in str(told.value)


def test_a_nan_is_named_before_anything_is_computed(tmp_path: Path) -> None:
    directory = tiny.causal(tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][1] = float("nan")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptError, match=r"model\.norm\.weight.*NaN"):
        lfm.load(directory).ask(Logits).logits({"input_ids": torch.tensor([[1, 2]])})


def test_a_module_is_a_copy_also_of_a_model_that_lies_in_memory(tmp_path: Path) -> None:
    stored = lfm.load(tiny.classifier(tmp_path / "m"))
    rewrapped = stored.ask(Gradients).rewrap(stored.ask(Gradients).module())
    weights = {name: tensor.read().clone() for name, tensor in stored.ask(Weights).tensors().items()}
    replaced = stored.ask(Weights).replace({name: value + 1 for name, value in weights.items()})
    for model in (rewrapped, replaced):
        before = {name: tensor.read().clone() for name, tensor in model.ask(Weights).tensors().items()}
        module = model.ask(Gradients).module()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        for name, tensor in model.ask(Weights).tensors().items():
            assert torch.equal(tensor.read(), before[name]), name
