"""The lean LoRA step: peft's own numbers and gradients, from less that is kept."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

import tiny
from lfm.core import Codec, Gradients
from lfm.models import forward, load
from lfm.models import layers as found
from lfm.models.activations import is_gelu_in_steps
from lfm.models.quiet import quiet
from lfm.train.lean import lean
from lfm.train.lean.modules import LEVELS, Adapted, Frozen, keeping, kept

BASES: dict[str, Callable[[Path], Path]] = {
    "causal": tiny.causal,
    "conv1d": tiny.conv1d,
    "masked": tiny.masked,
    "seq2seq": tiny.seq2seq,
}


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models here are so small that their products would be left as they are."""
    monkeypatch.setattr(sys.modules["lfm.train.lean"], "LEAST", 0)
    monkeypatch.setattr(sys.modules["lfm.train.lean"], "MANY", 0)


def peft_module(base: Path | nn.Module, **settings: Any) -> Any:
    module = load(base).ask(Gradients).module() if isinstance(base, Path) else base
    names = found.projections(module)
    stored = any(type(module.get_submodule(name)).__name__ == "Conv1D" for name in names)
    config = peft.LoraConfig(target_modules=names, init_lora_weights=False, fan_in_fan_out=stored, **settings)
    torch.manual_seed(0)
    with quiet():
        return peft.get_peft_model(module, config).train()


def batch_of(directory: Path) -> dict[str, torch.Tensor]:
    model = load(directory)
    batch = dict(model.ask(Codec).texts(["the cat sat on the mat", "a dog", "birds and cats are happy"]))
    if model.facts.task == "seq2seq-lm":
        batch["decoder_input_ids"] = batch["input_ids"][:, :3]
    return batch


def gradients(module: Any, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    loss = forward(module, batch).square().mean()
    loss.backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}
    module.zero_grad()
    return loss.item(), found


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_are_those_of_finite_differences(drop: float, turned: bool, biased: bool) -> None:
    random = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random)

    x, a, b = (tensor.requires_grad_() for tensor in (made(2, 3, 5), made(2, 5), made(4, 2)))
    weight, bias = made(5, 4) if turned else made(4, 5), made(4) if biased else None

    def adapted(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
        return Adapted.apply(x, x.detach(), weight, bias, a, b, 1.7, drop, 11, turned)

    assert torch.autograd.gradcheck(adapted, (x, a, b))
    assert torch.autograd.gradcheck(lambda x: Frozen.apply(x, x.detach(), weight, bias, turned), (x,))
    mask = kept(x.detach().reshape(-1, 5), drop, 11).reshape(x.shape) * LEVELS / keeping(drop) if drop else 1
    expected = F.linear(x, weight.T if turned else weight, bias) + 1.7 * (x * mask) @ a.T @ b.T
    torch.testing.assert_close(adapted(x, a, b), expected)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_losses_and_gradients_are_pefts(name: str, rslora: bool, tmp_path: Path) -> None:
    directory = BASES[name](tmp_path / "base")
    module, batch = peft_module(directory, r=4, lora_alpha=6, use_rslora=rslora), batch_of(directory)
    loss, theirs = gradients(module, batch)
    with lean(module) as count:
        ours_loss, ours = gradients(module, batch)
    assert count >= len(found.projections(load(directory).ask(Gradients).module()))
    assert ours_loss == pytest.approx(loss, rel=1e-6) and ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert (ours[key] - expected).norm() <= 1e-5 * expected.norm()  # measured: 2e-6 at most


def test_under_autocast_gradients_differ_from_fp32s_no_more_than_pefts_do(tmp_path: Path) -> None:
    directory = tiny.causal(tmp_path / "base")
    module, batch = peft_module(directory, r=4), batch_of(directory)
    _, exact = gradients(module, batch)
    apart = []
    for context in (nullcontext, lambda: lean(module)):
        with context(), torch.autocast("cpu", torch.bfloat16):
            _, rounded = gradients(module, batch)
        apart.append([((rounded[key] - exact[key]).norm() / exact[key].norm()).item() for key in exact])
    theirs, ours = (sum(each) / len(each) for each in apart)
    assert 0 < ours < 1.2 * theirs


def bytes_kept(module: Any, batch: dict[str, torch.Tensor], narrow: bool) -> int:
    """Of all storages that the backward pass waits for, less the module's own; each counted once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    context = torch.autocast("cpu", torch.bfloat16) if narrow else nullcontext()
    with context, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(module, batch).square().mean()
        kept_bytes = sum(seen.values())
    loss.backward()
    module.zero_grad()
    return kept_bytes


@pytest.mark.parametrize(("drop", "narrow", "most"), [(0.0, True, 0.75), (0.1, True, 0.7), (0.1, False, 0.7)])
def test_what_is_kept_for_the_backward_pass(drop: float, narrow: bool, most: float, tmp_path: Path) -> None:
    """A Llama's block, as wide as its sequence is long; measured .70, .48 and .64 of peft's."""
    directory = tiny.causal(tmp_path / "base", hidden_size=128, intermediate_size=344, num_hidden_layers=2)
    module = peft_module(directory, r=8, lora_dropout=drop)
    batch = {"input_ids": torch.randint(0, 300, (4, 64), generator=torch.Generator().manual_seed(0))}
    theirs = bytes_kept(module, batch, narrow)
    with lean(module):
        ours = bytes_kept(module, batch, narrow)
    assert ours <= most * theirs


@pytest.mark.parametrize(("drop", "narrow", "most"), [(0.0, True, 0.75), (0.1, True, 0.7), (0.1, False, 0.7)])
def test_what_a_gpt2s_block_keeps(drop: float, narrow: bool, most: float) -> None:
    """Its activation function is written out in steps, and one projection has nobody to share its input with."""
    shape = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 300}
    config = transformers.GPT2Config(**shape, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0)  # type: ignore[arg-type]
    module = peft_module(transformers.GPT2LMHeadModel(config), r=8, lora_dropout=drop)
    batch = {"input_ids": torch.randint(0, 300, (4, 64), generator=torch.Generator().manual_seed(0))}
    theirs = bytes_kept(module, batch, narrow)
    with lean(module):
        ours = bytes_kept(module, batch, narrow)
    assert ours <= most * theirs, ours / theirs


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", ["gelu_new", "quick_gelu", "gelu_fast", "gelu_accurate", "gelu_python"])
def test_an_activation_function_of_steps_gives_the_same(name: str, narrow: bool) -> None:
    """And keeps what it read, and no more. GELU's tanh form to rounding, others to the bit."""
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 8, generator=random).to(torch.bfloat16 if narrow else torch.float32)
    pull = torch.randn(64, 8, generator=random).to(inputs.dtype)
    made: Any = nn.Sequential(ACT2FN[name])

    def both(context: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
        x, kept_bytes = inputs.clone().requires_grad_(), {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept_bytes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        counted = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with context, torch.autocast("cpu", torch.bfloat16, enabled=narrow), counted:
            y = made(x)
        y.backward(pull)
        assert x.grad is not None
        return y.detach(), x.grad, sum(kept_bytes.values())

    y, gradient, theirs = both(nullcontext())
    again, same, ours = both(lean(made))
    allowed = (0.05 if narrow else 1e-5) if is_gelu_in_steps(made[0]) else 0.0
    torch.testing.assert_close(again, y, rtol=allowed, atol=allowed)
    torch.testing.assert_close(same, gradient, rtol=allowed, atol=allowed)
    assert ours == inputs.untyped_storage().nbytes() < theirs


def test_products_too_small_to_pay_for_our_calls_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows · 8 tokens through a LoRA's layer and a frozen one, 4 × 4 each: 128 multiplications a row."""
    monkeypatch.setattr(sys.modules["lfm.train.lean"], "LEAST", 2 * 128)
    monkeypatch.setattr(sys.modules["lfm.train.lean"], "MANY", 3 * 128)
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module: Any = peft.get_peft_model(layers, peft.LoraConfig(target_modules=["0"], r=2))  # type: ignore[arg-type]

    def ours(rows: int) -> set[str]:
        with lean(module):
            above = [module(torch.ones(rows, 8, 4, requires_grad=True)).grad_fn]
        found = set()
        while above:
            found |= {type(node).__name__ for node in above}
            above = [child for node in above for child, _ in node.next_functions if child is not None]
        return found & {"AdaptedBackward", "FrozenBackward"}

    assert [ours(rows) for rows in (1, 2, 3)] == [set(), {"AdaptedBackward"}, {"AdaptedBackward", "FrozenBackward"}]


def test_a_function_of_one_step_is_left_alone() -> None:
    with lean(nn.Sequential(nn.GELU(), nn.SiLU(), nn.ReLU(), nn.Softmax(-1))) as count:
        assert count == 0


def test_dropped_numbers_are_the_seeds_and_as_many_as_asked_for() -> None:
    x = torch.zeros(401, 257)
    for drop in (0.1, 0.5, 0.9):
        mask = kept(x, drop, 3)
        assert torch.equal(mask, kept(x, drop, 3)) and not torch.equal(mask, kept(x, drop, 4))
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        # five standard deviations of a mean of 103 057 coins
        assert abs(mask.mean().item() - (1 - drop)) < 5 * (drop * (1 - drop) / x.numel()) ** 0.5 + 2 / LEVELS
    assert kept(x, 1e-9, 0).all() and keeping(0.25) == 49152


def test_one_seed_gives_one_step_and_evaluation_drops_nothing(tmp_path: Path) -> None:
    directory = tiny.causal(tmp_path / "base")
    module, batch = peft_module(directory, r=4, lora_dropout=0.5), batch_of(directory)
    with lean(module):
        first, again = gradients(module, batch), gradients(module, batch)
        assert first[0] == again[0] and all(torch.equal(first[1][key], again[1][key]) for key in first[1])
        torch.manual_seed(2)
        assert forward(module, batch).square().mean().item() != first[0]
        inside = forward(module.eval(), batch)
    torch.testing.assert_close(inside, forward(module, batch), rtol=1e-5, atol=1e-5)


def test_layers_are_pefts_again_afterwards_and_a_copy_made_inside_is_its_own(tmp_path: Path) -> None:
    directory = tiny.causal(tmp_path / "base")
    module, batch = peft_module(directory, r=4), batch_of(directory)
    before = set(module.state_dict())
    with lean(module):
        other = copy.deepcopy(module)
        assert set(module.state_dict()) == before
    assert not any("forward" in vars(layer) for layer in module.modules())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert gradients(other, batch)[0] > 0


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_what_is_more_than_a_plain_lora_is_left_to_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    directory = tiny.causal(tmp_path / "base")
    module, batch = peft_module(directory, r=4, **settings), batch_of(directory)
    loss, theirs = gradients(module, batch)
    with lean(module):
        ours_loss, ours = gradients(module, batch)
    assert ours_loss == pytest.approx(loss, rel=1e-6)
    for key, expected in theirs.items():
        torch.testing.assert_close(ours[key], expected, rtol=1e-4, atol=1e-6 * max(expected.abs().max().item(), 1e-3))


def test_a_frozen_layer_keeps_nothing_and_a_trained_one_is_left_alone() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), Conv1D(4, 8))
    module[1].requires_grad_(False)
    module[2].requires_grad_(False)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    module(x).sum().backward()
    expected = module[0].weight.grad.clone()  # type: ignore[union-attr,operator]
    module.zero_grad()
    with lean(module):
        module(x).sum().backward()
    torch.testing.assert_close(module[0].weight.grad, expected)
