"""What layers say of their data: closed forms, and zero where nothing differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import tiny
from lfm.core import Gradients
from lfm.distilling import statistics
from lfm.distilling.pictures import Frame, jittered, leaves, roughness, variation
from lfm.models import load


def normed() -> nn.Sequential:
    """x ↦ batch norm of A x, with moments of its own."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3)
    module = nn.Sequential(nn.Linear(5, 3), norm)
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return module.double().eval()


def test_the_term_is_zero_where_the_moments_are_those_that_are_known() -> None:
    module, x = normed(), torch.randn(50, 5, dtype=torch.float64)
    known = statistics.measured(module, [lambda: module(x)], ["1"])
    with statistics.matched(module, known) as gap:
        module(x)
        assert gap() < 1e-12
        module(x + 1)
        assert gap() > 0.1
    with statistics.matched(module, {}) as gap:
        module(x)
        assert gap() == 0


def test_its_gradient_is_the_closed_form() -> None:
    """R = ‖m − μ‖ + ‖v − σ²‖ with a = A x + b: ∂R/∂a_i = (m − μ)/(n‖m − μ‖) + 2 (a_i − m)(v − σ²)/(n‖v − σ²‖)."""
    module = normed()
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    known = statistics.stored(module)
    with statistics.matched(module, known) as gap:
        module(x)
        gap().backward()
    linear, (mean, var) = module[0], known["1"]
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        a = linear(x)
        m, v = a.mean(0), a.var(0, unbiased=False)
        slope = (m - mean) / (7 * (m - mean).norm()) + 2 * (a - m) * (v - var) / (7 * (v - var).norm())
        assert x.grad is not None and torch.allclose(x.grad, slope @ linear.weight)


def test_moments_over_batches_are_those_of_all_together() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    x = torch.randn(6, 9, 4)
    whole = statistics.measured(module, [lambda: module(x)], ["1"])["1"]
    parts = statistics.measured(module, [lambda part=part: module(part) for part in x.split(2)], ["1"])["1"]
    assert torch.allclose(whole.mean, parts.mean, atol=1e-6) and torch.allclose(whole.var, parts.var, atol=1e-6)
    assert torch.allclose(whole.mean, module[0](x).mean((0, 1)), atol=1e-6)


def test_of_a_network_that_lays_channels_both_ways_every_norm_is_known_by_its_own() -> None:
    """ConvNeXt: norms between stages read (B, C, H, W), those of blocks (B, H, W, C), the last (B, C)."""
    config = transformers.ConvNextConfig(
        num_channels=3, hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2, num_labels=4
    )
    torch.manual_seed(0)
    module: Any = transformers.ConvNextForImageClassification(config).eval()
    records = statistics.recorded(module, [lambda: module(torch.rand(40, 3, 12, 20)).logits])
    layers = dict(module.named_modules())
    assert {len(found.mean) for found in records.layers.values()} == {8, 12}
    for name, (mean, var) in records.layers.items():
        assert len(mean) == len(var) == statistics.channels(layers[name]), name


def test_a_batch_norms_channels_are_the_second_axis() -> None:
    module, x = nn.Sequential(nn.BatchNorm2d(3)), torch.randn(4, 3, 5, 6)
    found = statistics.measured(module.eval(), [lambda: module(x)], statistics.norms(module))["0"]
    assert torch.allclose(found.mean, x.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(found.var, x.var((0, 2, 3), unbiased=False), atol=1e-6)


def test_a_vit_has_norms_to_read_that_remember_nothing(tmp_path: Path) -> None:
    module = load(tiny.vit(tmp_path / "vit")).ask(Gradients).module()
    x = torch.randn(2, 3, 8, 8)
    assert statistics.stored(module) == {}
    found = statistics.measured(module, [lambda: module(x)], statistics.norms(module))
    assert len(found) == 2 * 2 + 1 and all(len(mean) == 32 for mean, _ in found.values())


def test_total_variations_are_their_closed_forms() -> None:
    """Of a ramp that rises by 2 to the right, 3 × 4: across 9 differences, down 8 of 0, 6 on each diagonal, of 2."""
    ramp = (2.0 * torch.arange(4.0)).expand(1, 1, 3, 4)
    assert roughness(ramp).item() == pytest.approx(2 * 9**0.5 + 0 + 2 * 2 * 6**0.5)
    assert variation(ramp).item() == pytest.approx(2.0)
    assert roughness(torch.ones(2, 3, 5, 5)) == 0


def test_jitter_only_moves_pixels() -> None:
    images = torch.arange(2.0 * 3 * 8 * 8).view(2, 3, 8, 8)
    torch.manual_seed(3)
    moved = jittered(images, 0.25, flip=True)
    assert not torch.equal(moved, images)
    assert torch.equal(moved.flatten(2).sort(-1).values, images.flatten(2).sort(-1).values)
    assert torch.equal(jittered(images, 0.0, flip=False), images)


def test_dead_leaves_are_flat_within_black_and_white() -> None:
    frame = Frame((3, 16, 16), torch.full((3, 1, 1), -2.0), torch.full((3, 1, 1), 2.0))
    torch.manual_seed(0)
    made = leaves(frame, 4)
    assert made.shape == (4, 3, 16, 16) and made.abs().max() <= 2
    flat = (made[..., 1:] == made[..., :-1]).float().mean()
    assert 0.4 < flat < 1
