"""A language model up to its head: last hidden states instead of logits, so that a loss makes few logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.errors import ModelError
from lfm.core.heavy import nn, torch
from lfm.core.interfaces import Batch
from lfm.models import layers
from lfm.models.device import forward

if TYPE_CHECKING:
    from torch import Tensor

PROBED = 8
"""Tokens of a record that are enough to see what a model does to its head's answers."""


class Headless(NamedTuple):
    """What a head reads, and the head: logits = hidden · weightᵀ + bias."""

    hidden: Tensor  # (…, d)
    weight: Tensor  # (V, d)
    bias: Tensor | None = None  # (V,)


Body = Callable[["nn.Module", Batch], Headless]
"""(module, batch) → its last hidden states (B, T, d), and its head."""


def headless(module: nn.Module, batch: Batch) -> Body | None:
    """How to get a language model's hidden states and head, found on a batch; None where its logits are no linear
    function of them (tanh about them), or its head is no plain linear layer (an adapter on it, a quantised one).

    A factor on the logits goes to the hidden states, what is added to them to the bias. The model is run twice, on one
    row's first tokens, with answers put in its head's place. What is found holds for copies of the module too.
    """
    try:
        name = layers.last_linear(module)
    except ModelError:
        return None
    head: Any = module.get_submodule(name)
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return None
    few = {key: tensor[:1, :PROBED] if tensor.ndim == 2 else tensor[:1] for key, tensor in batch.items()}
    answers = torch.linspace(-100.0, 100.0, head.out_features)[torch.randperm(head.out_features, generator=_fixed())]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # dropout, of what is run for a look alone
        added, given = (_answered(module, head, few, answers * size) for size in (0.0, 1.0))
    if added.shape[-1] != head.out_features or not torch.equal(added, added[:1, :1].expand_as(added)):
        return None
    added = added[0, 0]
    changed, widest = given - added, int(answers.abs().argmax())
    scale = float(changed[0, 0, widest] / answers[widest].to(changed))
    if not torch.allclose(changed, answers.to(changed) * scale, rtol=1e-2 if head.weight.itemsize == 2 else 1e-5):
        return None
    return partial(_body, name, scale, added if bool(added.any()) else None)


def _body(name: str, scale: float, added: Tensor | None, module: nn.Module, batch: Batch) -> Headless:
    head: Any = module.get_submodule(name)
    with _instead(head, _stop):
        try:
            forward(module, batch)
        except _Reached as reached:
            hidden = reached.hidden
        else:
            raise AssertionError(f"{name} was not called")
    bias = head.bias
    if scale != 1:
        hidden, bias = hidden * scale, None if bias is None else bias * scale
    if added is not None:
        added = added.to(hidden.device)
        bias = added if bias is None else bias + added
    return Headless(hidden, head.weight, bias)


class _Reached(Exception):
    """The head was called: what a model does after it is not wanted."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _stop(hidden: Tensor) -> Tensor:
    raise _Reached(hidden)


def _answered(module: nn.Module, head: nn.Module, batch: Batch, answers: Tensor) -> Tensor:
    """The module's logits, were these its head's answers everywhere."""

    def said(hidden: Tensor) -> Tensor:
        return answers.to(hidden).expand(*hidden.shape[:-1], -1).clone()

    with _instead(head, said):
        return forward(module, batch)


@contextmanager
def _instead(head: nn.Module, answer: Callable[[Tensor], Tensor]) -> Iterator[None]:
    head.forward = answer
    try:
        yield
    finally:
        del head.forward  # the class's own shows again


def _fixed() -> torch.Generator:
    return torch.Generator().manual_seed(0)
