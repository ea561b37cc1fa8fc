"""A module as a frozen half, which reads, and a plastic one, which learns from what the first hands over."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lfm.core.errors import ConfigError
from lfm.core.heavy import torch
from lfm.core.interfaces import Batch
from lfm.models import forward, structure
from lfm.models.layers import stages
from lfm.models.resume import Begun, recording, resumed

if TYPE_CHECKING:
    from torch import Tensor, nn


class Half(NamedTuple):
    """A module of which the blocks before `upto`, and what precedes them, are frozen. blank: a batch of one input."""

    module: nn.Module
    upto: int
    blank: Batch
    wrapped: bool  # whether a block puts out its hidden states in a tuple


def halved(module: nn.Module, plastic: int, blank: Batch) -> Half:
    """The module with only its last blocks and what follows them to be trained. ConfigError where none is left."""
    names = structure.all_blocks(module)
    upto = len(names) - plastic
    if upto < 1:
        raise ConfigError(f"plastic={plastic} leaves no block to freeze", why=f"the model has {len(names)}")
    found = stages(module)
    first = next(i for i, stage in enumerate(found) if any(f"{n}.".startswith(f"{names[upto]}.") for n in stage))
    after = {name for stage in found[first:] for name in stage}
    for name, child in module.named_modules():
        for parameter in child.parameters(recurse=False):
            parameter.requires_grad_(name in after)
    with torch.no_grad(), recording(module, upto) as begun:
        forward(module, blank)
    return Half(module, upto, blank, begun[0].wrapped)


def handed(half: Half, batch: Batch) -> Tensor:
    """What the frozen half hands over of a batch: (B, T, width), without gradients."""
    with torch.no_grad(), recording(half.module, half.upto) as begun:
        forward(half.module, batch)
    return begun[0].hidden.float()


def plastic(half: Half, hidden: Tensor) -> Tensor:
    """F(z): the logits that the last blocks make of features; the frozen ones are passed over."""
    blank = {name: tensor[:1].expand(len(hidden), *tensor.shape[1:]) for name, tensor in half.blank.items()}
    with resumed(half.module, Begun(half.upto, hidden, half.wrapped)):
        return forward(half.module, blank)
