"""lfm.models.symmetry: what may be permuted, found by following a pass; every element of it leaves the logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tiny
from lfm import models
from lfm.core import Gradients
from lfm.models import symmetry as sym
from lfm.models.mixing import parameters_of

IDS = torch.arange(3, 17).reshape(2, 7)
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32).double()}


def spread(module: nn.Module) -> nn.Module:
    """The module with no weight left at the zero or one it began as: gains, biases and running statistics."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in parameters_of(module).items():
            if name in module.state_dict():
                change = torch.randn(tensor.shape, generator=random) * 0.1
                tensor.add_(change.abs() if name.endswith("running_var") else change)
    return module.double().eval()


def transformer(name: str, here: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    if name == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = GPT2Config(
            vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
        )
        return GPT2LMHeadModel(shape), TEXT
    if name == "resnet":
        from transformers import ResNetConfig, ResNetForImageClassification

        shape = ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[2, 2], layer_type="basic", num_labels=5)
        return ResNetForImageClassification(shape), PIXELS
    module = models.load(getattr(tiny, name)(here / name)).ask(Gradients).module()
    if name == "vit":
        return module, {"pixel_values": PIXELS["pixel_values"][:, :, :8, :8]}
    return module, {**TEXT, "labels": IDS} if name == "seq2seq" else TEXT


def told(groups: Any) -> list[Any]:
    """Sizes of the groups, each with those of the groups inside one of its elements."""
    return [(g.size, told(g.inner[0])) if g.inner else g.size for g in groups]


HEADS = (4, [8, 8])  # heads, with what queries and keys, and values, may permute inside
BERT = [32, HEADS, 64, HEADS, 64]
FOUND = {
    # rotary positions hold queries and keys; two key-value heads with the two query heads that each serves, and values
    "causal": [32, (2, [2, 8]), 64, (2, [2, 8]), 64],
    "masked": BERT,  # the head's own layer is read by the tied embeddings, so it goes with the residual stream
    "classifier": [*BERT, 32],  # the pooler's own
    "encoder": [*BERT[1:], 32],  # hidden states are what comes out, so the residual stream is pinned
    "vit": BERT,
    "gpt2": [32, (2, [16, 16]), 128, (2, [16, 16]), 128],
    # one table of relative positions for all layers: their self-attention heads move together
    "seq2seq": [32, (4, [8] * 4), 64, 64, (4, [8] * 4), (4, [8] * 4), 64, 64],
    # the stem; each stage's first convolutions, residual stream and second block
    "resnet": [8, 16, 16, 16, 24, 24, 24],
}


@pytest.mark.parametrize("name", FOUND)
def test_every_group_is_found_and_a_random_element_leaves_the_logits(name: str, tmp_path: Path) -> None:
    module, batch = transformer(name, tmp_path)
    found = sym.symmetry(spread(module), batch)
    assert not found.unknown
    assert told(found.groups) == FOUND[name]
    tensors = parameters_of(module)
    for seed in range(3):
        moves = sym.drawn(found, torch.Generator().manual_seed(seed))
        after = sym.permuted(tensors, moves)
        assert sym.difference(module, after, batch) < 1e-6
        changed = {key for key in tensors if not torch.equal(after[key], tensors[key])}
        assert {p.name for group in sym.groups(found.groups) for p in group.places} == changed


def test_each_group_alone_is_needed_whole(tmp_path: Path) -> None:
    """Moving a group at all its places but one changes the logits: no place is there by chance."""
    module, batch = transformer("causal", tmp_path)
    found = sym.symmetry(spread(module), batch)
    tensors = parameters_of(module)
    for group in sym.groups(found.groups):
        order = torch.arange(group.size).roll(1)
        assert sym.difference(module, sym.permuted(tensors, [(group, order)]), batch) < 1e-6
        for left in range(len(group.places)):
            less = group._replace(places=group.places[:left] + group.places[left + 1 :])
            assert sym.difference(module, sym.permuted(tensors, [(less, order)]), batch) > 1e-4


def built(name: str, **shape: Any) -> nn.Module:
    import transformers

    architecture = getattr(transformers, name)
    return architecture(architecture.config_class(**shape))


SHAPE = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "max_position_embeddings": 64}
SHAPE |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHARED = SHAPE | {"num_key_value_heads": 2}
OTHERS: dict[str, tuple[str, dict[str, Any], list[Any]]] = {
    "norms on queries and keys": (
        "Qwen3ForCausalLM",
        SHARED | {"head_dim": 8},
        [32, (2, [2, 8]), 48, (2, [2, 8]), 48],
    ),
    "one matrix for queries, keys and values": ("Phi3ForCausalLM", SHARED, [32, (2, [2, 8]), 48, (2, [2, 8]), 48]),
    "the same within each head, partly rotary": ("GPTNeoXForCausalLM", SHAPE, [32, (4, [8, 6]), 48, (4, [8, 6]), 48]),
    # the heads' slopes are constants, so heads stay and what is inside each may be permuted
    "slopes for heads": (
        "BloomForCausalLM",
        {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        [32, 8, 8, 8, 8, 128, 8, 8, 8, 8, 128],
    ),
    "layers that are one": (
        "AlbertForMaskedLM",
        SHAPE | {"embedding_size": 16, "num_hidden_groups": 1},
        [16, 32, (4, [8, 8]), 48],
    ),
    # which expert serves a token is told by number; all experts' keys are permuted alike
    "experts": ("MixtralForCausalLM", SHARED | {"num_local_experts": 4}, [32, (2, [2, 8]), 48, (2, [2, 8]), 48]),
    "a state space": (
        "MambaForCausalLM",
        {k: SHAPE[k] for k in SHAPE if "heads" not in k} | {"state_size": 4},
        [32, 48, 2, 48, 2, 4, 4],
    ),
    "groups of channels": (
        "RegNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 8, "num_labels": 5},
        [8, (2, [8]), 2, 16, (4, [8]), 4, 32, 8, 8],
    ),
    # its second stage's stream ends in a pooling that changes strides in place, for which there is no rule
    "windows, shifted": (
        "SwinForImageClassification",
        {"image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_labels": 5},
        [16, (2, [8, 8]), 64, (2, [8, 8]), 64, (4, [8, 8]), 128, (4, [8, 8]), 128],
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_architectures_that_no_rule_was_written_for(name: str) -> None:
    architecture, shape, groups = OTHERS[name]
    module = spread(built(architecture, **shape)).to(torch.float32 if name == "experts" else torch.float64)
    batch = PIXELS if "Image" in architecture else TEXT
    batch = {key: value.to(module.dtype) if value.is_floating_point() else value for key, value in batch.items()}
    found = sym.symmetry(module, batch)
    assert told(found.groups) == groups
    assert found.unknown == (("aten::as_strided_",) if name == "windows, shifted" else ())
    for seed in range(2):
        moves = sym.drawn(found, torch.Generator().manual_seed(seed))
        assert sym.difference(module, sym.permuted(parameters_of(module), moves), batch) < 1e-5


class Net(nn.Module):
    """Six channels in; a layer of eight, then what `between` does with it, then five classes."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(6, 8), nn.Linear(width, 5)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x)))


def with_zero(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 0] = 0
    return h


X = {"x": torch.linspace(-2, 2, 24).cos().reshape(4, 6)}
WEIGHTS = torch.linspace(0.5, 2, 8)
MAY = {
    "gelu": (F.gelu, [8]),
    "norm over all": (lambda h: F.layer_norm(h, (8,)), [8]),
    "softmax": (lambda h: h.softmax(-1), [8]),
    "a view there and back": (lambda h: h.view(4, 2, 4).transpose(1, 2).transpose(1, 2).reshape(4, 8), [(2, [4])]),
    "halves apart": (lambda h: torch.cat([h[:, 5:].relu(), h[:, :5]], 1), [3, 5]),
    "halves added": (lambda h: torch.cat([h[:, :4] + h[:, 4:], h[:, 4:]], 1), [4]),
    "norm within halves": (lambda h: F.group_norm(h, 2), [(2, [4])]),
    "norm across halves": (lambda h: h.view(4, 2, 4).softmax(1).reshape(4, 8), [(4, [2])]),
    "halves' sum beside each": (lambda h: (h.view(4, 2, 4) + h.view(4, 2, 4).sum(1, True)).reshape(4, 8), [(4, [2])]),
    "written in place": (lambda h: torch.zeros(4, 8).copy_(h), [8]),
    "written by row": (lambda h: torch.zeros(4, 8).index_put_((torch.arange(4),), h), [8]),
    "the same rows": (lambda h: h[torch.tensor([1, 0, 3, 2])], [8]),
    "masked rows": (lambda h: h[torch.tensor([True] * 4)], [8]),
    "gathered by row": (lambda h: h.gather(0, torch.ones_like(h, dtype=torch.long).cumsum(0) - 1), [8]),
    "repeated": (lambda h: h.repeat(1, 2).view(4, 2, 8).mean(1), [8]),
    "a matrix for each row": (lambda h: h[:, None] @ torch.ones(4, 8, 1) * h, [8]),
    "stacked": (lambda h: torch.stack([h, h.relu()]).sum(0), [8]),
    "pairs as complex numbers": (
        lambda h: torch.view_as_real(torch.view_as_complex(h.view(4, 4, 2)) * 1j).reshape(4, 8),
        [4],
    ),
    "padded": (lambda h: F.pad(h[:, :, None], (1, 1)).sum(2), [8]),
    "halves' mean, twice": (lambda h: h.view(4, 2, 4).mean(1).repeat(1, 2), [(4, [2, 2])]),
    "halves' products": (lambda h: (h.view(4, 2, 4) @ h.view(4, 2, 4).mT).flatten(1).repeat(1, 2), [2, 4]),
    "one looked at for its shape": (lambda h: h + torch.zeros(h[:, -1].shape)[:, None], [8]),
    "greatest": (lambda h: h - h.amax(-1, keepdim=True), [8]),
}
HELD = {
    "another weight for each": lambda h: h * WEIGHTS,
    "flipped": lambda h: h.flip(-1),
    "rolled": lambda h: h.roll(1, -1),
    "sorted": lambda h: h.sort(-1).values * WEIGHTS,
    "running sums": lambda h: h.cumsum(-1),
    "its greatest": lambda h: F.one_hot(h.argmax(-1), 8) + h,
    "the greatest first": lambda h: h.topk(8).values,
    "written by number": lambda h: h.index_put((torch.arange(4), torch.arange(4)), torch.zeros(4)),
    "gathered": lambda h: h.gather(1, torch.arange(7, -1, -1).repeat(4, 1)),
    "above the diagonal": lambda h: h[:, None].expand(4, 8, 8).triu().sum(1),
    "padded and cut": lambda h: F.pad(h, (1, -1)),
    "one used": lambda h: h * h[:, -1:].mean(1, keepdim=True) + h[:, 0, None],
    "one written": lambda h: with_zero(h),
    "one looked into": lambda h: h * float(h[0, 0]),
    "every second": lambda h: torch.cat([h[:, ::2], h[:, 1::2]], 1),
    "by number": lambda h: h[:, torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])],
    "an unknown operation": lambda h: torch.fft.fft(h).real,
    "outside torch": lambda h: torch.from_numpy(h.numpy()[:, ::-1].copy()),
    "windows": lambda h: F.avg_pool1d(h[:, None], 3, 1, 1)[:, 0],
    "unfolded": lambda h: h.unfold(1, 4, 4).reshape(4, 8),
}


@pytest.mark.parametrize("name", MAY)
def test_what_an_operation_lets_through_is_found(name: str) -> None:
    between, groups = MAY[name]
    net = Net(between).eval()
    found = sym.symmetry(net, X)
    assert told(found.groups) == groups
    for seed in range(5):
        moves = sym.drawn(found, torch.Generator().manual_seed(seed))
        assert sym.difference(net, sym.permuted(parameters_of(net), moves), X) < 1e-5


@pytest.mark.parametrize("name", HELD)
def test_where_the_order_counts_nothing_moves(name: str) -> None:
    assert sym.symmetry(Net(HELD[name]).eval(), X).groups == ()


def test_an_operation_without_a_rule_is_named() -> None:
    assert sym.symmetry(Net(HELD["an unknown operation"]), X).unknown == ("aten::_fft_r2c",)
    assert sym.symmetry(Net(F.gelu), X).unknown == ()


def test_what_no_operation_is_seen_to_use_is_not_moved() -> None:
    class Behind(Net):
        def forward(self, x: Tensor) -> Tensor:
            bias = torch.from_numpy(self.up.bias.detach().numpy() * 2.0)  # out of sight
            return self.down(F.linear(x, self.up.weight.data) + bias)

    net = Behind(F.gelu)
    found = sym.symmetry(net, X)
    moves = sym.drawn(found, torch.Generator().manual_seed(0))
    assert sym.difference(net, sym.permuted(parameters_of(net), moves), X) < 1e-5


def test_grouped_convolutions_move_whole_groups_and_flattened_images_whole_channels() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, groups=4)
            self.norm, self.last = nn.BatchNorm2d(12), nn.Linear(12 * 4, 5)

        def forward(self, pixel_values: Tensor) -> Tensor:
            h = F.max_pool2d(self.norm(self.second(self.first(pixel_values).relu())).relu(), 2)
            return self.last(h.flatten(1))

    net = spread(Grouped())
    batch = {"pixel_values": PIXELS["pixel_values"][:, :, :8, :8]}
    found = sym.symmetry(net, batch)
    assert told(found.groups) == [(4, [3]), 2]
    for seed in range(3):
        moves = sym.drawn(found, torch.Generator().manual_seed(seed))
        assert sym.difference(net, sym.permuted(parameters_of(net), moves), batch) < 1e-5


def test_nothing_is_changed_by_looking(tmp_path: Path) -> None:
    module, batch = transformer("vit", tmp_path)
    module.train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    sym.symmetry(module, batch)
    assert module.training and all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_activations_are_those_that_the_next_layer_reads() -> None:
    net = Net(F.relu).eval()
    with torch.no_grad():
        expected = net.up(X["x"]).relu()
    (seen,) = sym.activations(net, X)
    assert seen.group.pointwise and len(seen.values) == 1
    torch.testing.assert_close(seen.values[0], expected)


def test_padding_is_no_activation(tmp_path: Path) -> None:
    module, batch = transformer("classifier", tmp_path)
    mask = batch["attention_mask"].clone()
    mask[1, 4:] = 0
    seen = sym.activations(module.eval(), {**batch, "attention_mask": mask})
    keys = next(s for s in seen if s.group.size == 64)
    assert keys.values[0].shape == (11, 64)
