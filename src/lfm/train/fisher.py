"""How much each parameter matters to what a module says: the diagonal of its Fisher information."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from lfm.core.errors import ConfigError
from lfm.core.heavy import torch
from lfm.models.device import forward

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch
    from lfm.data.task import Task

Answers = Literal["expected", "sampled", "given"]

CLASSES = 128
"""Answers up to which the expectation over all of them is worth a backward pass each."""


def fisher_diagonal(
    module: nn.Module, examples: Iterable[Batch], task: Task, answers: Answers, random: torch.Generator
) -> dict[str, Tensor]:
    """F = E_x E_{y ~ p(y|x)} (∂ log p(y|x) / ∂θ)², by parameter name, on the CPU in fp64.

    examples: batches of one record each, since squares of sums are not sums of squares. answers: expected: over every
    class, exact; sampled: one answer drawn from the model's own distribution; given: the record's (the empirical
    Fisher). A record with several scored places (a text's tokens) counts as one outcome, the product of its answers.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float64, device="cpu") for name, p in trained.items()}
    count = 0

    def square(value: Tensor, *, again: bool = False) -> list[Tensor]:
        gradients = torch.autograd.grad(value, list(trained.values()), retain_graph=again, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g.square() for g, p in zip(gradients, trained.values())]

    for batch in examples:
        logits, labels = task.scored(forward(module, batch), batch)
        told = logits.log_softmax(-1)
        count += 1
        if answers == "expected":
            if told.shape[0] != 1 or told.shape[1] > CLASSES:
                raise ConfigError(
                    "an expectation over all answers is for one class a record",
                    why=f"these have {told.shape[0]} scored places with {told.shape[1]} answers each",
                    fix="answers=sampled",
                )
            shares = told.detach().exp()[0]
            each = [square(told[0, c], again=True) for c in range(told.shape[1])]
            found = [sum(share * g for share, g in zip(shares, parts)) for parts in zip(*each)]
        else:
            if answers == "sampled":
                drawn = torch.multinomial(told.detach().exp().cpu(), 1, generator=random)
                labels = drawn[:, 0].to(told.device)
            found = square(told.gather(1, labels[:, None]).sum())
        for kept, value in zip(total.values(), found):
            kept += value.double().cpu()  # type: ignore[union-attr]
    return {name: value / max(count, 1) for name, value in total.items()}
