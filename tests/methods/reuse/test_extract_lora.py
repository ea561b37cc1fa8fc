"""reuse.extract_lora: a fine-tuning's change as an adapter, the nearest there is."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from case import Case
from lfm import models
from lfm.core import Adaptation, Inputs, Model, Weights
from lfm.core.config import configure
from lfm.core.errors import ConfigError, MismatchError
from lfm.methods.reuse import extract_lora, merge_adapter
from lfm.runs.run import LocalRun
from lfm.tensors.lowrank import delta
from methods.reuse.lora import adapted, gpt2, logits_of, opened, peft_logits
from methods.reuse.merging import merge, tensors


def case(here: Path) -> Case:
    base = tiny.causal(here / "base")
    nudged(base, here / "tuned")
    return Case({"base": ("base",), "model": ("tuned",)}, settings={"rank": 4})


def nudged(base: Path, out: Path, far: float = 0.02) -> Path:
    """A model near another one: every parameter moved."""
    module = opened(base)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(far * torch.randn(parameter.shape, generator=random))
    module.save_pretrained(out)
    for file in base.glob("tokenizer*"):
        (out / file.name).write_bytes(file.read_bytes())
    return out


def resnet(path: Path) -> Path:
    torch.manual_seed(0)
    shape = {"embedding_size": 6, "hidden_sizes": [6, 8], "depths": [1, 1], "layer_type": "basic"}
    transformers.ResNetForImageClassification(transformers.ResNetConfig(**shape)).save_pretrained(path)
    return path


def extract(base: Path, tuned: Path, work: Path, **settings: Any) -> tuple[Model, dict[str, Any]]:
    config = configure(extract_lora.Config, settings)
    inputs = Inputs({"base": (models.load(base),), "model": (models.load(tuned),)})
    work.mkdir()
    run = LocalRun(0, work)
    extract_lora.agree(config, inputs)
    return extract_lora.run(config, inputs, run), dict(run.notes)


MODELS = {
    "llama": tiny.causal,
    "gpt2": gpt2,
    "resnet": resnet,
    "bert": tiny.masked,
    "vit": tiny.vit,
    "t5": tiny.seq2seq,
}


@pytest.mark.parametrize("name", MODELS)
def test_all_of_it_is_the_fine_tuning(name: str, tmp_path: Path) -> None:
    base = MODELS[name](tmp_path / "base")
    tuned = nudged(base, tmp_path / "tuned")
    made, notes = extract(base, tuned, tmp_path / "work", rank=0, energy=1.0)
    back = tensors(merge(merge_adapter, tmp_path, {"adapter": [made]}))
    left = notes.get("left_out", "")
    for stored, tensor in tensors(models.load(tuned)).items():
        if stored in left:  # what no adapter can hold, named
            assert not torch.equal(tensor, back[stored])
        else:
            torch.testing.assert_close(back[stored], tensor, rtol=1e-5, atol=1e-5)
    assert bool(left) == (name == "vit")  # its class token and positions belong to no layer
    assert notes["energy_kept"] == pytest.approx(1)
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out")
    merged, known = adapted(base, tmp_path / "out"), opened(tuned).state_dict()
    if name not in ("gpt2", "bert", "t5"):  # of tied layers peft would merge each one's change into their one weight
        for stored, tensor in merged.merge_and_unload().state_dict().items():
            if stored not in left:
                torch.testing.assert_close(tensor, known[stored], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_plain_peft_loads_it(name: str, tmp_path: Path) -> None:
    """GPT-2's embeddings and head are one weight; beside the base each is adapted, and the logits are the model's."""
    base = MODELS[name](tmp_path / "base")
    tuned = nudged(base, tmp_path / "tuned")
    made, _ = extract(base, tuned, tmp_path / "work", rank=0, energy=1.0)
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # one setting for layers of both kinds
        found = peft_logits(base, tmp_path / "out")
    known = logits_of(models.load(tuned))
    torch.testing.assert_close(found, known, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits_of(models.load(tmp_path / "out")), known, rtol=1e-3, atol=1e-3)
    assert models.load(tmp_path / "out").digest == made.digest


@pytest.mark.parametrize("settings", [{"rank": 5}, {"rank": 0, "energy": 0.6}, {"rank": 3, "energy": 0.6}], ids=str)
@pytest.mark.parametrize("iterations", [0, 4])
def test_it_is_the_nearest_of_its_rank(settings: dict[str, Any], iterations: int, tmp_path: Path) -> None:
    base = tiny.causal(tmp_path / "base")
    tuned = nudged(base, tmp_path / "tuned")
    made, notes = extract(base, tuned, tmp_path / "work", iterations=iterations, **settings)
    start, end = (tensors(models.load(path)) for path in (base, tuned))
    kept = total = 0.0
    for name, change in made.ask(Adaptation).changes().items():
        exact = (end[f"{name}.weight"].double() - start[f"{name}.weight"].double()).T
        exact = exact if change.embedding else exact.T
        values = torch.linalg.svdvals(exact).square()
        rank = change.a.shape[0]
        least = int((values.cumsum(0) < 0.6 * values.sum()).sum()) + 1
        wanted = settings["rank"] or least
        assert rank == (min(wanted, least) if "energy" in settings else wanted)
        error = (delta(change) - (exact.T if change.embedding else exact)).square().sum()
        torch.testing.assert_close(error, values[rank:].sum(), rtol=1e-3, atol=0)
        kept, total = kept + float(values[:rank].sum()), total + float(values.sum())
    assert notes["energy_kept"] == pytest.approx(kept / total, rel=1e-3)


def test_checkpoints_that_leave_out_the_heads_prefix(tmp_path: Path) -> None:
    """As the first ones of GPT-2 do: h.0.… for transformer.h.0.…"""
    base = gpt2(tmp_path / "base")
    tuned = nudged(base, tmp_path / "tuned")
    for path in (base, tuned):
        stored = load_file(path / "model.safetensors")
        short = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
        save_file(short, path / "model.safetensors", metadata={"format": "pt"})
    made, notes = extract(base, tuned, tmp_path / "work", rank=0, energy=1.0)
    assert "transformer.h.0.attn.c_attn" in made.ask(Adaptation).changes() and "left_out" not in notes
    back = tensors(merge(merge_adapter, tmp_path, {"adapter": [made]}))
    for stored, tensor in tensors(models.load(tuned)).items():
        torch.testing.assert_close(back[stored], tensor, rtol=1e-5, atol=1e-5)
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out")
    torch.testing.assert_close(peft_logits(base, tmp_path / "out"), logits_of(models.load(tuned)), rtol=1e-3, atol=1e-3)


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    base = tiny.causal(tmp_path / "base")
    tuned = nudged(base, tmp_path / "tuned")
    made, notes = extract(base, tuned, tmp_path / "work", whole=False)
    start, end = (tensors(models.load(path)) for path in (base, tuned))
    assert made.ask(Adaptation).whole() == {}
    norm = float((end["model.norm.weight"] - start["model.norm.weight"]).norm())
    assert f"model.norm.weight (‖Δ‖ = {norm:.3g})" in notes["left_out"]
    assert notes["left_out"].count("norm.weight") == 5 and notes["whole"] == 0


def test_only_what_changed(tmp_path: Path) -> None:
    base = tiny.causal(tmp_path / "base")
    weights = models.load(base).ask(Weights)
    name = "model.layers.0.mlp.up_proj.weight"
    (tmp_path / "tuned").mkdir()
    weights.replace({name: weights.tensors()[name].read() + torch.ones(64, 32)}).save(tmp_path / "tuned")
    made, notes = extract(base, tmp_path / "tuned", tmp_path / "work", energy=0.999)
    change = made.ask(Adaptation).changes()
    assert change.keys() == {name.removesuffix(".weight")} and notes["rank"] == 1
    torch.testing.assert_close(
        delta(change[name.removesuffix(".weight")]), torch.ones(64, 32).double(), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(MismatchError, match="no matrix differs"):
        extract(base, base, tmp_path / "again")


def test_settings_and_models_that_do_not_fit(tmp_path: Path) -> None:
    base, other = tiny.causal(tmp_path / "base"), tiny.causal(tmp_path / "other", intermediate_size=48)
    with pytest.raises(ConfigError, match="neither rank nor energy"):
        extract(base, base, tmp_path / "w", rank=0)
    with pytest.raises(MismatchError, match=r"\[64, 32\] against \[48, 32\]"):
        extract(base, other, tmp_path / "v")


def test_merged_by_peft_too(tmp_path: Path) -> None:
    base = tiny.causal(tmp_path / "base")
    tuned = nudged(base, tmp_path / "tuned")
    made, _ = extract(base, tuned, tmp_path / "work", rank=0, energy=1.0)
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out")
    merged = adapted(base, tmp_path / "out").merge_and_unload().state_dict()
    for name, tensor in tensors(models.load(tuned)).items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-5)
