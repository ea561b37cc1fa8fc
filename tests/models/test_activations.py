"""GELU written out is computed in one step, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

import tiny
from lfm.core import Gradients
from lfm.models import load
from lfm.models.activations import in_one_step


class Two(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(3, 5), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.first(x))


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu_accurate"])
def test_the_tanh_form_is_the_same_function_with_the_same_gradient(name: str) -> None:
    module, x = Two(ACT2FN[name]), torch.randn(64, 3)
    before = module(x)
    (slope,) = torch.autograd.grad(before.square().sum(), module.first.weight)
    with in_one_step(module):
        assert isinstance(module.act, nn.GELU)
        within = module(x)
        (again,) = torch.autograd.grad(within.square().sum(), module.first.weight)
    torch.testing.assert_close(within, before)
    torch.testing.assert_close(again, slope)
    assert module.act is ACT2FN[name] or type(module.act) is type(ACT2FN[name])


@pytest.mark.parametrize("name", ["gelu", "quick_gelu", "relu", "silu", "relu2", "laplace", "gelu_10"])
def test_other_activations_are_left(name: str) -> None:
    act = ACT2FN[name]
    module = Two(act)
    with in_one_step(module):
        assert module.act is act


def test_they_are_put_back_after_an_error(tmp_path: Path) -> None:
    module = load(tiny.conv1d(tmp_path / "gpt2")).ask(Gradients).module()
    acts = [type(child) for child in module.modules()]
    with pytest.raises(ZeroDivisionError), in_one_step(module):
        assert [type(child) for child in module.modules()] != acts
        raise ZeroDivisionError
    assert [type(child) for child in module.modules()] == acts
