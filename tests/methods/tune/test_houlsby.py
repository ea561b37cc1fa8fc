"""Bottleneck adapters: what they add, how many numbers they are, and on what they can be put."""

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
from lfm import runs, tuners
from lfm.core import Gradients, Inputs, Logits, registry
from lfm.core.errors import AccessError, MismatchError
from lfm.core.method import check
from lfm.models import load


def case(here: Path) -> Case:
    return tunings.case_on(here)


@pytest.mark.parametrize("model", tunings.MODELS)
def test_a_model_of_each_task_learns_and_its_adapter_comes_back(model: str, tmp_path: Path) -> None:
    tunings.learns_and_comes_back("tune.houlsby", model, tmp_path, width=8)


def test_the_parallel_form_learns_and_comes_back(tmp_path: Path) -> None:
    tunings.learns_and_comes_back("tune.houlsby", "classifier", tmp_path, width=8, form="parallel", scale=4.0)


def test_what_follows_a_part_is_h_plus_up_of_sigma_of_down() -> None:
    """By hand, on what the projection gives (sequential) and on what reached the part (parallel)."""
    for form in ("sequential", "parallel"):
        module, batch = bodies.body("bert")
        settings = tuners.HoulsbyConfig(width=3, form=form, scale=0.5, activation="relu", parts=("ffn",))
        adapted: Any = peft.get_peft_model(module, settings).eval()  # type: ignore[arg-type]
        block = adapted.get_base_model().bert.encoder.layer[0]
        layer = block.output.dense
        adapter = layer.adapters["default"]
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
        seen: dict[str, torch.Tensor] = {}
        block.intermediate.register_forward_pre_hook(lambda _, args, s=seen: s.update(x=args[0]))
        layer.base_layer.register_forward_hook(lambda _, __, out, s=seen: s.update(h=out))
        layer.register_forward_hook(lambda _, __, out, s=seen: s.update(y=out))
        bodies.outputs(adapted, batch)
        read = seen["h" if form == "sequential" else "x"]
        inner = (read @ adapter.down.T + adapter.down_bias).clamp(min=0)
        expected = seen["h"] + 0.5 * (inner @ adapter.up.T + adapter.up_bias)
        torch.testing.assert_close(seen["y"], expected)


@pytest.mark.parametrize("width", [1, 5, 64])
def test_a_module_has_2md_and_d_and_m_numbers(width: int) -> None:
    """Section 2.1 of the paper: 2md + d + m a module, two modules a block; the norms' train beside them."""
    module, _ = bodies.body("bert")
    norms = sum(p.numel() for m in module.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters())
    adapted = peft.get_peft_model(module, tuners.HoulsbyConfig(width=width))  # type: ignore[arg-type]
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == 2 * 2 * (2 * width * 32 + 32 + width) + norms


def test_the_norms_stay_as_they_are_where_told(tmp_path: Path) -> None:
    make, records = tunings.MODELS["causal"]
    base = make(tmp_path / "base")
    _, run = tunings.tune("tune.houlsby", base, records, tmp_path / "work", width=4, train_norms=False, steps=2)
    assert run.notes["trained"] == 2 * 2 * (2 * 4 * 32 + 32 + 4)
    _, run = tunings.tune("tune.houlsby", base, records, tmp_path / "more", width=4, steps=2)
    assert run.notes["trained"] == 2 * 2 * (2 * 4 * 32 + 32 + 4) + 5 * 32  # two norms a block and the last


def test_it_cannot_be_merged_and_says_so(tmp_path: Path) -> None:
    make, records = tunings.MODELS["causal"]
    made, _ = tunings.tune("tune.houlsby", make(tmp_path / "base"), records, tmp_path / "work", width=4, steps=2)
    with pytest.raises(AccessError, match="cannot be merged into its base"):
        made.ask(Gradients)
    assert list(made.formats) == ["adapter"]
    method = registry.get("tune.full").method
    with pytest.raises(AccessError) as told:
        check("tune.full", method, Inputs({"model": (made,)}, {"train": records}))
    assert told.value.why.startswith("it is a HOULSBY adapter, which cannot be merged into its base")
    assert told.value.fix.startswith(f"model={tmp_path / 'base'}, its base, or an adapter that can be merged")


def test_on_a_wrong_base_it_is_refused_and_the_right_one_is_named(tmp_path: Path) -> None:
    make, records = tunings.MODELS["causal"]
    base = make(tmp_path / "base")
    made, _ = tunings.tune("tune.houlsby", base, records, tmp_path / "work", width=4, steps=2)
    (tmp_path / "adapter").mkdir()
    made.save(tmp_path / "adapter")
    tiny.causal(tmp_path / "other", seed=1)
    wrong = runs.model(f"{tmp_path / 'other'}+{tmp_path / 'adapter'}")
    with pytest.raises(MismatchError, match="not the one it was made for") as caught:
        wrong.ask(Logits).logits(tunings.batch_of(made, records))
    assert str(base) in str(caught.value) and load(base).digest[:12] in str(caught.value)


def test_a_model_without_blocks_is_refused() -> None:
    from lfm.tuners.tuning import adapted

    with pytest.raises(MismatchError, match=r"houlsby cannot adapt this model.*tune.lora"):
        adapted(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), tuners.HoulsbyConfig(width=2))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sequential", "parallel"])
def test_with_a_twentieth_of_the_numbers_it_is_nearly_as_good_as_full_tuning(form: str) -> None:
    """The paper: within 0.4 points of GLUE at 3.6 % of the numbers."""
    tunings.nearly_as_good_as_full_tuning("tune.houlsby", points=0.03, share=0.05, width=8, lr=3e-3, form=form)
