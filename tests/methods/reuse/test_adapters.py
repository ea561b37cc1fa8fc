"""reuse.adapters: what several adapters add, in one, exactly."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from case import Case
from lfm import models
from lfm.core import Adaptation, Model, Weights
from lfm.core.errors import AccessError, ConfigError, MismatchError
from lfm.methods.reuse import adapters
from lfm.tensors.lowrank import delta
from methods.reuse.lora import IDS, adapted, adapter_over, logits_of, opened, peft_logits
from methods.reuse.merging import merge, tensors

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "other modules and ranks": ({"r": 2, "target_modules": ["q_proj", "up_proj"]}, {"r": 5}),
    "rsLoRA": ({"use_rslora": True}, {"use_rslora": True, "r": 3}),
    "one rsLoRA": ({"use_rslora": True}, {"lora_alpha": 1}),
    "patterns": ({"rank_pattern": {"q_proj": 2}}, {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"down_proj": 9}}),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, {}),
    "norms whole": ({"modules_to_save": ["norm"]}, {"modules_to_save": ["input_layernorm"]}),
    "a head, whole and changed": (
        {"modules_to_save": ["lm_head"], "target_modules": ["v_proj"]},
        {"target_modules": ["lm_head", "v_proj"]},
    ),
}


def case(here: Path) -> Case:
    base = tiny.causal(here / "base")
    adapter_over(base, here / "adapter1", seed=1, use_rslora=True, modules_to_save=["norm"])
    adapter_over(base, here / "adapter2", seed=2, r=3, target_modules=["q_proj", "up_proj"])
    return Case({"models": ("adapter1", "adapter2")}, settings={"rank": 4, "weights": [1, 0.5]})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.causal(tmp_path / "base")


def pair(base: Path, kind: str) -> list[Path]:
    return [adapter_over(base, base.parent / f"a{i}", seed=i, **KINDS[kind][i]) for i in range(2)]


def saved(model: Model, out: Path) -> Path:
    out.mkdir()
    model.save(out)
    return out


def in_plain_peft(base: Path, paths: list[Path], weights: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """θ₀ + Σ wᵢ (θᵢ − θ₀), each θᵢ merged by peft alone."""
    start = {name: value.double() for name, value in opened(base).state_dict().items()}
    merged = [adapted(base, path).merge_and_unload().state_dict() for path in paths]
    return {n: v + sum(w * (m[n].double() - v) for w, m in zip(weights, merged)) for n, v in start.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -1.5)], ids=str)
def test_it_is_the_exact_sum_and_plain_peft_loads_it(
    kind: str, weights: tuple[float, ...], base: Path, tmp_path: Path
) -> None:
    paths = pair(base, kind)
    made = merge(adapters, tmp_path, {"models": [models.load(path) for path in paths]}, weights=weights)
    known = in_plain_peft(base, paths, weights)
    out = saved(made, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = adapted(base, out).merge_and_unload()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor.double(), known[name], rtol=1e-5, atol=1e-5)
    for name, tensor in tensors(models.load(out)).items():
        torch.testing.assert_close(tensor.double(), known[name], rtol=1e-5, atol=1e-5)
    module = opened(base)
    module.load_state_dict({name: value.float() for name, value in known.items()})
    with torch.no_grad():
        logits = module.eval()(IDS).logits
    torch.testing.assert_close(peft_logits(base, out), logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits_of(models.load(out)), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", [{"combination_type": "cat"}, {"combination_type": "svd", "svd_rank": 8}], ids=str)
def test_rslora_adapters_where_pefts_own_sum_is_wrong(how: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """peft #3761: of peft 0.21 the sum is √r′ too large, r′ its rank. Ours is the sum."""
    paths = [adapter_over(base, tmp_path / f"p{i}", seed=i, use_rslora=True) for i in range(2)]
    known = in_plain_peft(base, paths, (1.0, 1.0))
    made = merge(adapters, tmp_path, {"models": [models.load(path) for path in paths]})
    for name, tensor in adapted(base, saved(made, tmp_path / "ours")).merge_and_unload().state_dict().items():
        torch.testing.assert_close(tensor.double(), known[name], rtol=1e-5, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(opened(base), paths[0], adapter_name="a")
    theirs.load_adapter(paths[1], adapter_name="b")
    theirs.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", **how)  # type: ignore[operator]
    theirs.save_pretrained(str(tmp_path / "peft"), selected_adapters=["c"])
    config = json.loads((tmp_path / "peft/c/adapter_config.json").read_text())
    assert config["r"] == 8
    name = "model.layers.0.self_attn.q_proj.weight"
    merged = adapted(base, tmp_path / "peft/c").merge_and_unload().state_dict()[name].double()
    start = opened(base).state_dict()[name].double()
    ratio = float((merged - start).norm() / (known[name] - start).norm())
    assert ratio == pytest.approx(8**0.5 if config["use_rslora"] else 1, rel=1e-3)  # 1 once peft has mended it


def test_rank_patterns_where_pefts_own_sum_cannot_be_loaded(base: Path, tmp_path: Path) -> None:
    """peft #3737: with rank patterns `linear` saves what peft cannot load; other ranks of one module it refuses."""
    paths = [adapter_over(base, tmp_path / f"p{i}", seed=i, rank_pattern={"q_proj": 2}) for i in range(2)]
    theirs = peft.PeftModel.from_pretrained(opened(base), paths[0], adapter_name="a")
    theirs.load_adapter(paths[1], adapter_name="b")
    theirs.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", combination_type="linear")  # type: ignore[operator]
    theirs.save_pretrained(str(tmp_path / "peft"), selected_adapters=["c"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        adapted(base, tmp_path / "peft/c")
    made = merge(adapters, tmp_path, {"models": [models.load(path) for path in paths]})
    known = in_plain_peft(base, paths, (1.0, 1.0))
    merged = adapted(base, saved(made, tmp_path / "ours")).merge_and_unload().state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), known[name], rtol=1e-5, atol=1e-5)


def changes(model: Model) -> dict[str, torch.Tensor]:
    return {name: delta(change) for name, change in model.ask(Adaptation).changes().items()}


def test_one_alone_stays_as_it_is(base: Path, tmp_path: Path) -> None:
    path = adapter_over(base, tmp_path / "a", lora_alpha=4, modules_to_save=["norm"])
    made = merge(adapters, tmp_path, {"models": [models.load(path)]})
    before = load_file(path / "adapter_model.safetensors")
    after = load_file(saved(made, tmp_path / "out") / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_less_itself_is_nothing(base: Path, tmp_path: Path) -> None:
    model = models.load(adapter_over(base, tmp_path / "a", use_rslora=True, modules_to_save=["norm"]))
    for settings in ({}, {"rank": 4}, {"energy": 0.9}):
        made = merge(adapters, tmp_path, {"models": [model, model]}, weights=[1, -1], **settings)
        for name, tensor in tensors(made).items():
            torch.testing.assert_close(tensor, tensors(models.load(base))[name], rtol=1e-6, atol=1e-6)
        assert models.load(saved(made, tmp_path / f"out{len(list(tmp_path.iterdir()))}")).digest == made.digest


def test_their_order_does_not_matter(base: Path, tmp_path: Path) -> None:
    given = [models.load(path) for path in pair(base, "other modules and ranks")]
    for settings in ({}, {"rank": 3}):
        one = merge(adapters, tmp_path, {"models": given}, weights=[2, 0.5], **settings)
        other = merge(adapters, tmp_path, {"models": given[::-1]}, weights=[0.5, 2], **settings)
        for name, change in changes(one).items():
            torch.testing.assert_close(changes(other)[name], change, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"rank": 3}, {"energy": 0.8}, {"rank": 3, "energy": 0.5}], ids=str)
def test_what_a_cut_loses_is_the_discarded_singular_values(
    settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    given = [models.load(path) for path in pair(base, "other modules and ranks")]
    whole = changes(merge(adapters, tmp_path, {"models": given}))
    less = changes(merge(adapters, tmp_path, {"models": given}, **settings))
    for name, change in whole.items():
        values = torch.linalg.svdvals(change)
        kept = int(torch.linalg.matrix_rank(less[name], rtol=1e-5))
        assert kept <= settings.get("rank", 99)
        lost = values[kept:].square().sum()
        torch.testing.assert_close((less[name] - change).square().sum(), lost, rtol=1e-3, atol=1e-8)
        if "rank" not in settings:
            assert lost <= 0.2 * values.square().sum() * (1 + 1e-6)


def test_a_mean(base: Path, tmp_path: Path) -> None:
    given = [models.load(path) for path in pair(base, "plain")]
    mean = merge(adapters, tmp_path, {"models": given}, weights=[3, 1], normalize=True)
    known = merge(adapters, tmp_path, {"models": given}, weights=[0.75, 0.25])
    assert mean.digest == known.digest


def test_what_does_not_go_together_is_named(base: Path, tmp_path: Path) -> None:
    other = tiny.causal(tmp_path / "other", seed=5)
    plain = models.load(adapter_over(base, tmp_path / "a"))
    with pytest.raises(MismatchError, match="adapt different models"):
        merge(adapters, tmp_path, {"models": [plain, models.load(adapter_over(other, tmp_path / "b"))]})
    dora = models.load(adapter_over(base, tmp_path / "c", use_dora=True))
    with pytest.raises(AccessError, match="use_dora: DoRA's magnitudes"):
        merge(adapters, tmp_path, {"models": [plain, dora]})
    with pytest.raises(ConfigError, match="3 values for 2 models"):
        merge(adapters, tmp_path, {"models": [plain, plain]}, weights=[1, 2, 3])
    with pytest.raises(ConfigError, match="sum to zero"):
        merge(adapters, tmp_path, {"models": [plain, plain]}, weights=[1, -1], normalize=True)
    with pytest.raises(ConfigError, match="all weights are zero"):
        merge(adapters, tmp_path, {"models": [plain, plain]}, weights=[0])
    whole = [adapter_over(base, tmp_path / f"w{i}", seed=i, modules_to_save=["norm"]) for i in range(2)]
    stored = load_file(whole[1] / "adapter_model.safetensors")
    stored["base_model.model.model.norm.weight"] = torch.ones(31)
    save_file(stored, whole[1] / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match=r"model\.norm\.weight is \[32\] in one and \[31\]"):
        merge(adapters, tmp_path, {"models": [models.load(path) for path in whole]})


def test_merging_rules_stream_adapters(base: Path, tmp_path: Path) -> None:
    """Any merge takes an adapter where it takes a model: its weights are computed as they are read."""
    from lfm.methods.reuse import task_arithmetic

    given = [models.load(path) for path in pair(base, "other modules and ranks")]
    made = merge(task_arithmetic, tmp_path, {"base": [models.load(base)], "models": given}, scale=1.0)
    known = tensors(merge(adapters, tmp_path, {"models": given}))
    for name, tensor in made.ask(Weights).tensors().items():
        torch.testing.assert_close(tensor.read(), known[name], rtol=1e-5, atol=1e-5)
