"""A linear probe: the best head on features that stay as they are, found exactly and not by steps of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lfm.core.errors import MismatchError
from lfm.core.heavy import F, nn, torch
from lfm.models.device import forward

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch
    from lfm.data.task import Task

ITERATIONS = 200
TOLERANCE = 1e-7
"""Of the gradient's largest entry, where L-BFGS stops."""


class Features(NamedTuple):
    """What the head reads, (N, d) fp64, and the classes (N,) that it should say."""

    values: Tensor
    labels: Tensor


class Head(NamedTuple):
    """weight (classes, d) and bias (classes,), fp64; no bias where the layer has none."""

    weight: Tensor
    bias: Tensor | None


def features(module: nn.Module, name: str, batches: Iterable[Batch], task: Task) -> Features:
    """What the linear layer `name` reads where the module's answers are scored, whatever pools it on the way.

    The layer is left out of the forward pass, so that its input comes out where the logits would. MismatchError where
    these, put through the layer, are not the logits: something stands between the layer and the answer.
    """
    parent, _, attribute = name.rpartition(".")
    holder, layer = module.get_submodule(parent), module.get_submodule(name)
    values: list[Tensor] = []
    labels: list[Tensor] = []
    with torch.no_grad():
        for batch in batches:
            setattr(holder, attribute, nn.Identity())
            try:
                found, right = task.scored(forward(module, batch), batch)
            finally:
                setattr(holder, attribute, layer)
            if not values and len(found):
                said, _ = task.scored(forward(module, batch), batch)
                again = layer(found) if found.shape[-1] == _width(layer) else said.new_zeros(0)
                if again.shape != said.shape or not torch.allclose(again.float(), said, rtol=1e-3, atol=1e-3):
                    raise MismatchError(
                        f"{name} alone does not make {type(module).__name__}'s logits",
                        why="something stands between what it says and the answer",
                        fix="tune.full needs no linear head",
                    )
            values.append(found.double().cpu())
            labels.append(right.cpu())
    return Features(torch.cat(values), torch.cat(labels))


def _width(layer: nn.Module) -> int:
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.weight.shape[0])  # type: ignore[union-attr]


def logistic(
    given: Features,
    start: Head,
    strength: float,
    anchor: Tensor | None = None,
    also: Callable[[Tensor, Tensor | None], Tensor] | None = None,
) -> Head:
    """argmin of mean CE(W x + b, y) + strength/2 · ‖W − anchor‖², from `start` by L-BFGS; b is free, the anchor else 0.

    Convex, with one solution for strength > 0. With N examples it is scikit-learn's C = 1 / (N · strength).
    also: of (W, b), added to the loss; what is found is then a minimum near `start`.
    """
    weight = start.weight.clone().double().requires_grad_()
    bias = None if start.bias is None else start.bias.clone().double().requires_grad_()
    home = torch.zeros_like(weight) if anchor is None else anchor.double()
    optimizer = torch.optim.LBFGS(
        [weight] if bias is None else [weight, bias],
        max_iter=ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(given.values, weight, bias), given.labels)
        value = value + strength / 2 * (weight - home).square().sum()
        if also is not None:
            value = value + also(weight, bias)
        value.backward()
        return value

    optimizer.step(closure)
    return Head(weight.detach(), None if bias is None else bias.detach())


def parted(given: Features, held_out: Tensor) -> tuple[Features, Features]:
    """What is not held out of the examples, and what is."""
    return Features(given.values[~held_out], given.labels[~held_out]), Features(
        given.values[held_out], given.labels[held_out]
    )


def swept(
    fitted: Features,
    told: Features,
    start: Head,
    strengths: Sequence[float],
    anchor: Tensor | None = None,
) -> tuple[float, float]:
    """(strength, accuracy) of the head, found on what is fitted, that does best on what is told.

    Of equally accurate strengths it is the one that is surer of the truth.
    """
    head, best, chosen = start, (-1.0, 0.0), strengths[0]
    for strength in sorted(strengths, reverse=True):  # from the stiffest on, each begins where the last one ended
        head = logistic(fitted, head, strength, anchor)
        logits = F.linear(told.values, *head)
        right = float((logits.argmax(-1) == told.labels).double().mean())
        score = (right, -float(F.cross_entropy(logits, told.labels)))
        if score > best:
            best, chosen = score, strength
    return chosen, best[0]
