"""Trained adapters, mixed by attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import bodies
import tiny
import tunings
from case import Case
from lfm import tuners
from lfm.core import Inputs, Logits, Model
from lfm.core.errors import AccessError, MismatchError
from lfm.core.method import check
from lfm.methods.tune import adapter_fusion
from lfm.models import load
from lfm.runs.run import LocalRun


def adapter(base: Path, out: Path, records: list[Any] = tunings.FACTS, **settings: Any) -> Path:
    settings = {"width": 4, "train_norms": False, "steps": 4} | settings
    made, _ = tunings.tune("tune.houlsby", base, records, out.with_suffix(".work"), **settings)
    out.mkdir()
    made.save(out)
    return out


def case(here: Path) -> Case:
    made = tunings.case_on(here)
    adapter(here / "base", here / "one")
    adapter(here / "base", here / "two", tunings.FACTS[:1], width=6)
    return Case({**made.models, "adapters": ("one", "two")}, made.data, made.settings)


def fuse(base: Path, adapters: list[Path], work: Path, **settings: Any) -> tuple[Model, LocalRun]:
    given = {"model": (load(base),), "adapters": tuple(map(load, adapters))}
    inputs = check("tune.adapter_fusion", adapter_fusion.METHOD, Inputs(given, {"train": tunings.FACTS}))
    run = LocalRun(0, work)
    config = adapter_fusion.Config(**({"steps": 20, "lr": 0.01, "batch_size": 4} | settings))
    made = adapter_fusion.run(config, inputs, run)
    assert isinstance(made, Model)
    return made, run


def test_one_adapter_and_copies_of_one_are_at_first_that_adapter(tmp_path: Path) -> None:
    """V = 1 and shares that sum to 1: whatever Q and K say. A rate of 1e-30 moves nothing."""
    base = tiny.causal(tmp_path / "base")
    one = adapter(base, tmp_path / "one", steps=20)
    for count in (1, 3):
        made, _ = fuse(base, [one] * count, tmp_path / str(count), steps=1, lr=1e-30)
        batch = tunings.batch_of(made, tunings.FACTS)
        expected = load(one).ask(Logits).logits(batch)
        torch.testing.assert_close(made.ask(Logits).logits(batch), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(load(base).ask(Logits).logits(batch), expected, atol=1e-2)


def test_it_learns_the_adapters_stay_and_it_comes_back(tmp_path: Path) -> None:
    base = tiny.causal(tmp_path / "base")
    ones = [adapter(base, tmp_path / "one"), adapter(base, tmp_path / "two", tunings.FACTS[:1], width=6)]
    made, run = fuse(base, ones, tmp_path / "work", steps=40)
    assert float(run.notes["loss_after"]) < 0.7 * float(run.notes["loss_before"])  # type: ignore[arg-type]
    assert run.notes["trained"] == 4 * (3 * 32 * 32 + 2 * 32)
    (tmp_path / "fused").mkdir()
    made.save(tmp_path / "fused")
    again = load(tmp_path / "fused")
    batch = tunings.batch_of(made, tunings.FACTS)
    assert torch.equal(again.ask(Logits).logits(batch), made.ask(Logits).logits(batch))
    from safetensors.torch import load_file

    fused = load_file(tmp_path / "fused" / "adapter_model.safetensors")
    for number, one in enumerate(ones):
        for name, tensor in load_file(one / "adapter_model.safetensors").items():
            here = name.replace(".houlsby_adapter.", f".adapter_fusion_adapter.frozen.{number}.")
            assert torch.equal(fused[here], tensor)


def test_what_is_added_is_the_attention_of_h_to_what_the_adapters_add() -> None:
    """By hand, token by token and adapter by adapter."""
    module, _ = bodies.body("bert")
    adapted: Any = peft.get_peft_model(module, tuners.AdapterFusionConfig(widths=(3, 2)))  # type: ignore[arg-type]
    fusion = adapted.get_base_model().bert.encoder.layer[0].output.dense.adapters["default"]
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.3)
    h = torch.randn(5, 32)
    for token, expected in zip(h, fusion(h)):
        added = [one.up @ nn.functional.gelu(one.down @ token + one.down_bias) + one.up_bias for one in fusion.frozen]
        query = fusion.query @ token + fusion.query_bias
        scores = torch.stack([query @ (fusion.key @ a + fusion.key_bias) for a in added])
        shares = scores.exp() / scores.exp().sum()
        by_hand = sum(share * (fusion.value @ a) for share, a in zip(shares, added))
        torch.testing.assert_close(expected, by_hand, rtol=1e-4, atol=1e-5)


def test_a_large_penalty_keeps_v_at_the_identity(tmp_path: Path) -> None:
    base = tiny.causal(tmp_path / "base")
    one = adapter(base, tmp_path / "one")
    far = []
    for penalty in (0.0, 100.0):
        made, _ = fuse(base, [one], tmp_path / str(penalty), penalty=penalty)
        (out := tmp_path / f"{penalty}.out").mkdir()
        made.save(out)
        from safetensors.torch import load_file

        values = [t for name, t in load_file(out / "adapter_model.safetensors").items() if name.endswith(".value")]
        far.append(sum(float((v - torch.eye(32)).square().sum()) for v in values))
    assert far[1] < far[0] / 4


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base = tiny.causal(tmp_path / "base")
    one = adapter(base, tmp_path / "one")
    with pytest.raises(MismatchError, match=r"differ in form.*sequential"):
        fuse(base, [one, adapter(base, tmp_path / "beside", form="parallel")], tmp_path / "a")
    with pytest.raises(MismatchError, match=r"norms of its own.*train_norms=false"):
        fuse(base, [one, adapter(base, tmp_path / "norms", train_norms=True)], tmp_path / "b")
    other = tiny.causal(tmp_path / "other", seed=1)
    with pytest.raises(MismatchError, match="an adapter over another model") as caught:
        fuse(other, [one], tmp_path / "c")
    assert str(base) in str(caught.value)
    with pytest.raises(AccessError):
        fuse(base, [base], tmp_path / "d")


def test_adapters_of_another_kind_are_refused_before_any_work(tmp_path: Path) -> None:
    base = tiny.causal(tmp_path / "base")
    (tmp_path / "lora").mkdir()
    tunings.tune("tune.lora", base, tunings.FACTS, tmp_path / "work", steps=1)[0].save(tmp_path / "lora")
    given = Inputs({"model": (load(base),), "adapters": (load(tmp_path / "lora"),)}, {"train": tunings.FACTS})
    with pytest.raises(MismatchError, match=r"is a LORA adapter.*tune.houlsby"):
        adapter_fusion.agree(adapter_fusion.Config(), given)


@pytest.mark.slow
def test_with_few_records_it_does_better_than_an_adapter_of_its_own(tmp_path: Path) -> None:
    """Adapters of four other renderings of digits, fused on 60 mirrored ones, against one trained on those 60 alone."""
    from lfm import zoo
    from lfm.zoo import vision

    base = zoo.model("vit-base")
    how = {"width": 8, "lr": 3e-3, "train_norms": False, "batch_size": 32, "epochs": 4}
    others = []
    for task in ("identity", "rotation", "halfturn", "inversion"):
        made, _ = tunings.tune(
            "tune.houlsby", base, list(vision.images(task, "train")), tmp_path / task, **how, steps=0
        )
        (tmp_path / f"{task}.out").mkdir()
        made.save(tmp_path / f"{task}.out")
        others.append(tmp_path / f"{task}.out")
    train, test = list(vision.images("mirror", "train")[:60]), vision.images("mirror", "test")
    fused, alone = [], []
    for seed in range(3):
        given = {"model": (load(base),), "adapters": tuple(map(load, others))}
        inputs = check("tune.adapter_fusion", adapter_fusion.METHOD, Inputs(given, {"train": train}))
        config = adapter_fusion.Config(steps=120, lr=1e-3, batch_size=32)
        made = adapter_fusion.run(config, inputs, LocalRun(seed, tmp_path / f"fusion{seed}"))
        assert isinstance(made, Model)
        fused.append(tunings.accuracy(made, test))
        settings = how | {"steps": 120}
        made, _ = tunings.tune("tune.houlsby", base, train, tmp_path / f"alone{seed}", seed=seed, **settings)
        alone.append(tunings.accuracy(made, test))
    print("fused", fused, "alone", alone)
    assert sum(fused) > sum(alone)
