"""What a stored LoRA adapter changes, told without a module, held against what peft makes of it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from lfm.core import Adaptation, Codec, Gradients, Logits, Model, Weights
from lfm.core.errors import AccessError, CorruptError, MismatchError
from lfm.models import adapter, checkpoint, combine, load
from lfm.tensors.lazy import lazy
from lfm.tensors.lowrank import Plus
from methods.reuse.lora import IDS, adapted, adapter_over, gpt2, logits_of, opened, peft_logits

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True, "r": 3},
    "patterns": {
        "use_rslora": True,
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 5, "down_proj": 1},
        "alpha_pattern": {r"layers\.1\..*": 7, "q_proj": 11},
    },
    "some layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    "norms whole": {"modules_to_save": ["model.norm", "input_layernorm"]},
    "an embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "an embedding whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "half": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_and_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    base = tiny.causal(tmp_path / "base")
    model = load(adapter_over(base, tmp_path / "a", **SETTINGS[name]))
    close = 3e-2 if name == "half" else 1e-4
    merged = adapted(base, tmp_path / "a").merge_and_unload().state_dict()
    for stored, tensor in model.ask(Weights).tensors().items():
        torch.testing.assert_close(tensor.read(), merged[stored], rtol=close, atol=close / 10)
    known = peft_logits(base, tmp_path / "a")
    torch.testing.assert_close(logits_of(model), known, rtol=close, atol=close)


@pytest.mark.parametrize("targets", [["embed_tokens", "v_proj"], ["embed_tokens", "lm_head"], ["lm_head"]], ids=str)
def test_embeddings_that_peft_keeps_beside_their_factors(targets: list[str], tmp_path: Path) -> None:
    """What peft saves by default where an embedding is adapted: base_layer.weight, which is the base's own."""
    base = tiny.causal(tmp_path / "base")
    made = adapter_over(base, tmp_path / "a", target_modules=targets, embeddings="auto")
    kept = [name for name in load_file(made / "adapter_model.safetensors") if "lora_" not in name]
    assert any(name.endswith(".base_layer.weight") for name in kept)
    model = load(made)
    merged = adapted(base, made).merge_and_unload().state_dict()
    for stored, tensor in model.ask(Weights).tensors().items():
        torch.testing.assert_close(tensor.read(), merged[stored], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits_of(model), peft_logits(base, made), rtol=1e-4, atol=1e-5)
    total = combine.added([model], [1.0])
    assert {f"{name}.weight" for name in total.changes}.isdisjoint(total.whole)
    assert set(total.changes) == set(model.ask(Adaptation).changes())  # what is the base's is no change


def test_what_an_adapter_holds_and_changes_is_the_sum(tmp_path: Path) -> None:
    """base_layer.weight that is not the base's, as after a tokenizer grew: it stands in its place, plus BA."""
    base = tiny.causal(tmp_path / "base")
    made = adapter_over(base, tmp_path / "a", target_modules=["embed_tokens"], embeddings="auto")
    tensors = load_file(made / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("embed_tokens.base_layer.weight"))
    save_file({**tensors, name: tensors[name] + 1}, made / "adapter_model.safetensors")
    model = load(made)
    merged = adapted(base, made).merge_and_unload().state_dict()
    found = model.ask(Weights).tensors()["model.embed_tokens.weight"].read()
    torch.testing.assert_close(found, merged["model.embed_tokens.weight"], rtol=1e-5, atol=1e-6)
    assert found.mean() > 0.9
    torch.testing.assert_close(logits_of(model), peft_logits(base, made), rtol=1e-4, atol=1e-5)
    total = combine.added([model], [1.0])
    assert not total.changes
    torch.testing.assert_close(lazy(total.whole["model.embed_tokens.weight"]).read(), found, rtol=1e-6, atol=1e-6)


def test_tied_embeddings_that_peft_keeps_beside_their_factors(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base")
    model = load(adapter_over(base, tmp_path / "a", target_modules=["wte", "c_attn"], embeddings="auto"))
    with pytest.raises(MismatchError, match="ties"):
        model.ask(Weights)
    torch.testing.assert_close(logits_of(model), peft_logits(base, tmp_path / "a"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["c_attn", "attn.c_proj", "mlp.c_proj"]},
        {"target_modules": ["attn.c_proj"]},
        {"target_modules": ["attn.c_proj"], "bias": "all"},
        {"target_modules": ["c_attn"], "bias": "lora_only"},
        {"target_modules": ["c_attn", "attn.c_proj"], "lora_bias": True, "use_rslora": True},
        {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]},
    ],
    ids=str,
)
def test_weights_stored_in_out_and_biases(settings: dict[str, Any], tmp_path: Path) -> None:
    """GPT-2's Conv1D: of its layers attn.c_proj is square, so that shapes do not tell which way it is stored."""
    base = gpt2(tmp_path / "base")
    model = load(adapter_over(base, tmp_path / "a", **settings))
    merged = adapted(base, tmp_path / "a").merge_and_unload().state_dict()
    for stored, tensor in model.ask(Weights).tensors().items():
        torch.testing.assert_close(tensor.read(), merged[stored], rtol=1e-5, atol=1e-6)


def test_convolutions(tmp_path: Path) -> None:
    base = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic")
    )
    base.save_pretrained(tmp_path / "base")
    made = adapter_over(tmp_path / "base", tmp_path / "a", target_modules=["convolution"], r=3)
    merged = adapted(tmp_path / "base", made).merge_and_unload().state_dict()
    model = load(made)
    changes = model.ask(Adaptation).changes()
    assert {change.kernel for change in changes.values()} == {(1, 1), (3, 3), (7, 7)}
    for stored, tensor in model.ask(Weights).tensors().items():
        torch.testing.assert_close(tensor.read(), merged[stored], rtol=1e-5, atol=1e-5)
    again = load(tmp_path / "base").ask(Weights).adapt(changes, model.ask(Adaptation).whole())
    (tmp_path / "b").mkdir()
    again.save(tmp_path / "b")
    merged = adapted(tmp_path / "base", tmp_path / "b").merge_and_unload().state_dict()
    for stored, tensor in model.ask(Weights).tensors().items():
        torch.testing.assert_close(tensor.read(), merged[stored], rtol=1e-5, atol=1e-5)


def test_tensors_that_transformers_renames_as_it_loads_them(tmp_path: Path) -> None:
    """A ViT's checkpoint says attention.attention.query where its module, and so the adapter, says q_proj."""
    base = tiny.vit(tmp_path / "base")
    settings = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"], "bias": "lora_only"}
    model = load(adapter_over(base, tmp_path / "a", **settings))
    streamed = model.ask(Weights).tensors()
    assert any(isinstance(tensor, Plus) for tensor in streamed.values())
    (tmp_path / "merged").mkdir()
    model.save(tmp_path / "merged", "checkpoint")
    pixels = {"pixel_values": torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    channels = load(base).ask(Gradients).module().config.num_channels  # type: ignore[union-attr]
    pixels["pixel_values"] = pixels["pixel_values"][:, :channels]
    with torch.no_grad():
        known = adapted(base, tmp_path / "a")(**pixels).logits
    for found in (model, load(tmp_path / "merged")):
        torch.testing.assert_close(found.ask(Logits).logits(pixels), known, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_change_is_stored_as_an_adapter_that_peft_loads(name: str, tmp_path: Path) -> None:
    base = tiny.causal(tmp_path / "base")
    model = load(adapter_over(base, tmp_path / "a", **SETTINGS[name]))
    adaptation = model.ask(Adaptation)
    again = adaptation.base.ask(Weights).adapt(adaptation.changes(), adaptation.whole())
    (tmp_path / "b").mkdir()
    again.save(tmp_path / "b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of keys that it lacks
        found = peft_logits(base, tmp_path / "b")
    close = 3e-2 if name == "half" else 1e-4
    torch.testing.assert_close(found, peft_logits(base, tmp_path / "a"), rtol=close, atol=close)
    torch.testing.assert_close(logits_of(load(tmp_path / "b")), found, rtol=1e-4, atol=1e-4)
    assert load(tmp_path / "b").digest == again.digest


def test_nothing_of_the_base_is_read_and_no_module_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.causal(tmp_path / "base")
    adapter_over(base, tmp_path / "a")

    def refuse(*_: object) -> None:
        raise AssertionError("a module was built")

    monkeypatch.setattr(checkpoint, "open_module", refuse)
    monkeypatch.setattr(adapter, "open_peft", refuse)
    model = load(tmp_path / "a")
    whole = {name: tensor.read() for name, tensor in model.ask(Weights).tensors().items()}  # no module
    assert len(whole) > 10
    with (base / "model.safetensors").open("r+b") as file:  # the header stays
        size = file.seek(0, 2)
        file.seek(size - 4)
        file.write(b"\x00\x00\xc0\x7f")
    assert load(tmp_path / "a").ask(Adaptation).changes()


def test_what_it_computes_does_not_depend_on_how_it_is_read(tmp_path: Path) -> None:
    base = tiny.causal(tmp_path / "base")
    model = load(adapter_over(base, tmp_path / "a", r=7))
    for tensor in model.ask(Weights).tensors().values():
        whole = tensor.read().reshape(-1)
        read_flat: Callable[[int, int], torch.Tensor] = tensor.read_flat  # type: ignore[attr-defined]
        pieces = [read_flat(i, min(i + 37, len(whole))) for i in range(0, len(whole), 37)]
        assert torch.equal(torch.cat(pieces), whole)


VARIANTS: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
}


@pytest.mark.parametrize("says", VARIANTS)
def test_what_is_not_a_change_of_low_rank_is_refused_by_name(says: str, tmp_path: Path) -> None:
    base = tiny.causal(tmp_path / "base")
    model = load(adapter_over(base, tmp_path / "a", **VARIANTS[says]))
    with pytest.raises(AccessError, match=says):
        model.ask(Adaptation)
    if says == "use_dora":  # the merged module still gives its weights
        merged = adapted(base, tmp_path / "a").merge_and_unload().state_dict()
        found = model.ask(Weights).tensors()["model.layers.0.self_attn.q_proj.weight"].read()
        torch.testing.assert_close(found, merged["model.layers.0.self_attn.q_proj.weight"], rtol=1e-4, atol=1e-5)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    base, other = tiny.causal(tmp_path / "base"), tiny.causal(tmp_path / "other", intermediate_size=48)
    made = adapter_over(base, tmp_path / "a", target_modules=["up_proj"])
    config = json.loads((made / "adapter_config.json").read_text())
    (made / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    with pytest.raises(MismatchError, match=r"up_proj.weight is \[48, 32\], its change \[64, 32\]"):
        load(made).ask(Weights)
    with pytest.raises(MismatchError, match=r"up_proj.weight is \[48, 32\], its change \[64, 32\]"):
        combine.added([load(made)], [0.5])
    tensors = load_file(made / "adapter_model.safetensors")
    save_file(
        {**tensors, "base_model.model.x.lora_magnitude_vector": torch.ones(2)}, made / "adapter_model.safetensors"
    )
    with pytest.raises(MismatchError, match="lora_magnitude_vector"):
        load(made).ask(Adaptation).changes()
    del tensors[next(name for name in tensors if "lora_A" in name)]
    save_file(tensors, made / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match="not a product of two factors"):
        load(made).ask(Adaptation).changes()


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("asked", [Weights, Logits, Gradients])
def test_an_adapter_of_another_architecture_is_refused(
    kind: str, asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is opened for; where the base's weights are streamed, before any is read."""
    made = adapter_over(gpt2(tmp_path / "gpt2"), tmp_path / "a", target_modules=["c_attn"])
    base, where = tiny.causal(tmp_path / "base"), made / "adapter_config.json"
    config = json.loads(where.read_text()) | {"base_model_name_or_path": str(base)}
    if kind == "ia3":
        config = {key: config[key] for key in ("base_model_name_or_path", "target_modules")} | {"peft_type": "IA3"}
    where.write_text(json.dumps(config))
    if asked is Weights and kind == "lora":
        monkeypatch.setattr(checkpoint, "open_module", lambda source: pytest.fail("a module was built"))
    with pytest.raises(MismatchError, match="does not fit") as caught:
        given: Any = load(made).ask(asked)
        given.module() if asked is Gradients else given.logits({"input_ids": IDS})
    assert "c_attn" in caught.value.why and str(base) in caught.value.what
    if kind == "lora":
        with pytest.raises(MismatchError, match=r"c_attn.*LlamaForCausalLM has no such layer"):
            combine.added([load(made)], [0.5])
        with pytest.raises(MismatchError, match="no such layer"):
            combine.one_base([load(made)])


def test_what_is_saved_merged_is_told(tmp_path: Path) -> None:
    """Over a bfloat16 base the checkpoint is rounded, an adapter is not: what was saved is returned."""
    base = tiny.causal(tmp_path / "base")
    opened(base).to(torch.bfloat16).save_pretrained(base)
    adapter_over(base, tmp_path / "a", target_modules=["q_proj"])
    whole = load(tmp_path / "a")
    for model in (whole, adapter_over_gradients_alone(whole)):
        out = tmp_path / f"merged {len(model.gives)}"
        out.mkdir()
        saved = model.save(out, "checkpoint")
        assert torch.equal(logits_of(saved), logits_of(load(out)))
        assert not torch.equal(logits_of(saved), logits_of(model))
    (tmp_path / "again").mkdir()
    assert whole.save(tmp_path / "again", "adapter") is whole


def adapter_over_gradients_alone(model: Model) -> Model:
    """As a method makes it that was given no more of its model than gradients."""
    base = model.ask(Adaptation).base.only((Gradients, Codec))
    files = load_file(Path(model.ref) / "adapter_model.safetensors")
    config = json.loads((Path(model.ref) / "adapter_config.json").read_text())
    return adapter.model_of(adapter.Source("trained", base, config, lambda: files))


def test_a_nan_is_named(tmp_path: Path) -> None:
    base = tiny.causal(tmp_path / "base")
    made = adapter_over(base, tmp_path / "a", target_modules=["up_proj"])
    tensors = load_file(made / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, name: tensors[name] * float("nan")}, made / "adapter_model.safetensors")
    with pytest.raises(CorruptError, match=r"layers\.\d\.mlp\.up_proj' holds a NaN"):
        load(made).ask(Adaptation).changes()
    other = name.replace("lora_B", "lora_A")  # finite factors of what is not
    large = {name: torch.full_like(tensors[name], 1e38), other: torch.full_like(tensors[other], 1e38)}
    save_file({**tensors, **large}, made / "adapter_model.safetensors")
    with pytest.raises(CorruptError, match=r"layers\.\d\.mlp\.up_proj\.weight' is not finite"):
        for tensor in load(made).ask(Weights).tensors().values():
            tensor.read()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"r": 3}, "of rank 4"),
        ({"rank_pattern": {"up_proj": 2}}, "by its config the rank is 2"),
        ({"lora_alpha": "6"}, "lora_alpha is '6'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"alpha_pattern": {"up_proj": 0}}, r"alpha_pattern\['up_proj'\] is 0"),
        ({"alpha_pattern": {"(": 3}}, "no regular expression"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_its_file(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    made = adapter_over(tiny.causal(tmp_path / "base"), tmp_path / "a", target_modules=["up_proj"])
    config = json.loads((made / "adapter_config.json").read_text())
    (made / "adapter_config.json").write_text(json.dumps(config | settings))
    with pytest.raises((MismatchError, CorruptError), match=says):
        load(made).ask(Adaptation).changes()


def test_one_of_two_tied_layers(tmp_path: Path) -> None:
    """An adapter of the embedding alone, where the head shares its weight: merging would change both."""
    base = gpt2(tmp_path / "base")
    model = load(adapter_over(base, tmp_path / "a", target_modules=["wte", "c_attn"]))
    batch = {"input_ids": IDS}
    known = peft_logits(base, tmp_path / "a")
    torch.testing.assert_close(model.ask(Logits).logits(batch), known, rtol=1e-5, atol=1e-5)
    with pytest.raises(MismatchError, match="ties"):
        model.ask(Weights)
    with pytest.raises(MismatchError, match="ties"):
        model.ask(Gradients).module()
    changes = dict(load(tmp_path / "a").ask(Adaptation).changes())
    changes["lm_head"] = changes["transformer.wte"]._replace(
        b=changes["transformer.wte"].a.T, a=changes["transformer.wte"].b.T, transposed=False, embedding=False
    )
    both = load(base).ask(Weights).adapt(changes)  # of both of them alike it can be said
    wte = both.ask(Weights).tensors()["transformer.wte.weight"].read()
    assert not torch.equal(wte, load(base).ask(Weights).tensors()["transformer.wte.weight"].read())
