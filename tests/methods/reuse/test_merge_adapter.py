"""reuse.merge_adapter: W + s·BA, into the adapter's base or another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny
from case import Case
from lfm import models
from lfm.core import Adaptation, Weights
from lfm.core.errors import AccessError, ConfigError, MismatchError
from lfm.methods.reuse import merge_adapter
from lfm.tensors.lowrank import delta
from methods.reuse.lora import IDS, adapted, adapter_over, gpt2, logits_of, opened, peft_logits
from methods.reuse.merging import merge, tensors


def case(here: Path) -> Case:
    base = tiny.causal(here / "base")
    tiny.causal(here / "later", seed=1)
    adapter_over(base, here / "adapter", use_rslora=True, modules_to_save=["norm"])
    return Case({"adapter": ("adapter",), "model": ("later",)})


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA and patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 9}},
    "norms whole": {"modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_pefts_merge(kind: str, tmp_path: Path) -> None:
    base = tiny.causal(tmp_path / "base")
    path = adapter_over(base, tmp_path / "a", **KINDS[kind])
    made = merge(merge_adapter, tmp_path, {"adapter": [models.load(path)]})
    known = adapted(base, path).merge_and_unload().state_dict()
    for name, tensor in tensors(made).items():
        torch.testing.assert_close(tensor, known[name], rtol=1e-6, atol=1e-6)
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits_of(made), plain(IDS).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(made), peft_logits(base, path), rtol=1e-4, atol=1e-4)


def test_another_model_gets_the_same_change(tmp_path: Path) -> None:
    base, later = tiny.causal(tmp_path / "base"), tiny.causal(tmp_path / "later", seed=1)
    path = adapter_over(base, tmp_path / "a", modules_to_save=["norm"])
    roles = {"adapter": [models.load(path)], "model": [models.load(later)]}
    made = tensors(merge(merge_adapter, tmp_path, roles, scale=0.5))
    change = {name: delta(c) for name, c in models.load(path).ask(Adaptation).changes().items()}
    whole = models.load(path).ask(Adaptation).whole()
    assert len(whole) == 5  # every norm's name ends so
    start, before = opened(base).state_dict(), opened(later).state_dict()
    for name, tensor in made.items():
        known = before[name].double() + 0.5 * change.get(name.removesuffix(".weight"), torch.zeros(()))
        if name in whole:
            known = before[name].double() + 0.5 * (whole[name].read().double() - start[name].double())
        torch.testing.assert_close(tensor, known.float(), rtol=1e-6, atol=1e-6)


def test_taken_off_again(tmp_path: Path) -> None:
    base = tiny.causal(tmp_path / "base")
    adapter = models.load(adapter_over(base, tmp_path / "a", modules_to_save=["norm"]))
    there = merge(merge_adapter, tmp_path, {"adapter": [adapter]})
    back = merge(merge_adapter, tmp_path, {"adapter": [adapter], "model": [there]}, scale=-1.0)
    for name, tensor in tensors(back).items():
        torch.testing.assert_close(tensor, opened(base).state_dict()[name], rtol=1e-6, atol=1e-6)


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    base = tiny.causal(tmp_path / "base")
    opened(base).bfloat16().save_pretrained(base)
    adapter = models.load(adapter_over(base, tmp_path / "a"))
    start = models.load(base).ask(Weights).tensors()
    made = tensors(merge(merge_adapter, tmp_path, {"adapter": [adapter]}))
    for name, change in adapter.ask(Adaptation).changes().items():
        exact = start[f"{name}.weight"].read().double() + delta(change)
        assert torch.equal(made[f"{name}.weight"], exact.bfloat16())


def test_what_does_not_fit_is_refused_unread(tmp_path: Path) -> None:
    base, wide = tiny.causal(tmp_path / "base"), tiny.causal(tmp_path / "wide", intermediate_size=48)
    adapter = models.load(adapter_over(base, tmp_path / "a"))
    with pytest.raises(MismatchError, match=r"down_proj.weight is \[32, 48\], its change \[32, 64\]"):
        merge(merge_adapter, tmp_path, {"adapter": [adapter], "model": [models.load(wide)]})
    with pytest.raises(MismatchError, match="no tensor"):
        merge(merge_adapter, tmp_path, {"adapter": [adapter], "model": [models.load(gpt2(tmp_path / "gpt2"))]})
    with pytest.raises(ConfigError, match="scale is 0"):
        merge(merge_adapter, tmp_path, {"adapter": [adapter]}, scale=0.0)
    with pytest.raises(AccessError, match="adaptation"):
        merge(merge_adapter, tmp_path, {"adapter": [models.load(base)]})


def test_half_of_a_tied_pair_is_refused(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base")
    path = adapter_over(base, tmp_path / "a", target_modules=["wte", "c_attn"])
    with pytest.raises(MismatchError, match="ties"):
        merge(merge_adapter, tmp_path, {"adapter": [models.load(path)]})
    merged = adapted(base, path).merge_and_unload()
    with torch.no_grad():  # what is refused: peft's merge is another model than its adapter
        assert (merged(IDS).logits - peft_logits(base, path)).abs().max() > 1
