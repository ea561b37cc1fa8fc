"""Inner loops of meta-learning: the same few steps from one start, on each of several tasks.

One task after another in place, or all at once by torch.func. All at once is quicker while a model is small (ViTs on
a CPU core: 2.1 times at width 32 with 16 tasks, 1.2 with 5, not at width 128) and holds one copy of the weights a task.
What branches on values (transformers' attention masks) or counts batches in place cannot be done at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from lfm.core.heavy import nn, torch
from lfm.train.called import called

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch

Rule = Literal["adam", "sgd"]
Loss = Callable[["nn.Module", "Batch"], "Tensor"]

SECOND, EPSILON = 0.999, 1e-8
"""β₂ and ε of the inner Adam; β₁ is 0, so that one task's direction does not carry into the next steps."""

SMALL = 250_000
"""Parameters up to which all tasks at once are worth their memory."""


def descend(parameters: Sequence[Tensor], losses: Sequence[Callable[[], Tensor]], lr: float, rule: Rule) -> Tensor:
    """One step a loss, in place; the first loss. adam: fresh moments, β₁ = 0."""
    each: Any = torch  # one call for all parameters
    first: Tensor | None = None
    squares = [torch.zeros_like(p) for p in parameters] if rule == "adam" else []
    for step, loss in enumerate(losses, start=1):
        value = loss()
        first = value.detach() if first is None else first
        gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            if rule == "sgd":
                each._foreach_add_(parameters, gradients, alpha=-lr)
                continue
            each._foreach_mul_(squares, SECOND)
            each._foreach_addcmul_(squares, gradients, gradients, 1 - SECOND)
            scales = each._foreach_div(squares, 1 - SECOND**step)
            each._foreach_sqrt_(scales)
            each._foreach_add_(scales, EPSILON)
            each._foreach_addcdiv_(parameters, gradients, scales, -lr)
    assert first is not None
    return first


def adapted_mean(
    module: nn.Module, loss: Loss, tasks: Batch, lr: float, rule: Rule, *, at_once: bool | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """The mean over tasks of the parameters after k steps, and the mean first loss; the module stays as it is.

    tasks: each tensor (tasks, k, batch, …). at_once: None leaves the choice to what is possible and quicker.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if at_once is None:
        at_once = worthwhile(module, tasks)
    if at_once:
        return _at_once(module, loss, tasks, lr, rule, trained)
    parameters = list(trained.values())
    mean = [torch.zeros_like(p) for p in parameters]
    firsts = []
    for task in range(next(iter(tasks.values())).shape[0]):
        with adapted(parameters, _steps(module, loss, tasks, task), lr, rule) as first, torch.no_grad():
            firsts.append(first)
            for total, parameter in zip(mean, parameters):
                total.add_(parameter)
    return {name: total / len(firsts) for name, total in zip(trained, mean)}, torch.stack(firsts).mean()


def _steps(module: nn.Module, loss: Loss, tasks: Batch, task: int) -> list[Callable[[], Tensor]]:
    def at(step: int) -> Callable[[], Tensor]:
        return lambda: loss(module, {name: tensor[task, step] for name, tensor in tasks.items()})

    return [at(step) for step in range(next(iter(tasks.values())).shape[1])]


@contextmanager
def adapted(
    parameters: Sequence[Tensor], losses: Sequence[Callable[[], Tensor]], lr: float, rule: Rule
) -> Iterator[Tensor]:
    """Inside, the parameters are those after these steps; then they are again what they were. Gives the first loss."""
    start = [p.detach().clone() for p in parameters]
    try:
        yield descend(parameters, losses, lr, rule)
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, start):
                parameter.copy_(value)


def worthwhile(module: nn.Module, tasks: Batch) -> bool:
    """Whether all tasks can, and should, be worked at once."""
    size = sum(p.numel() for p in module.parameters())
    counts_in_place = any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.modules())
    return size <= SMALL and not counts_in_place and not any(name.endswith("ids") for name in tasks)


def _at_once(
    module: nn.Module, loss: Loss, tasks: Batch, lr: float, rule: Rule, trained: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], Tensor]:
    from torch.func import functional_call, grad_and_value, vmap
    from torch.nn.attention import SDPBackend, sdpa_kernel

    whole = called(module, loss)
    names = {name: f"module.{name}" for name in trained}
    differentiate = grad_and_value(
        lambda p, batch: functional_call(whole, {names[n]: v for n, v in p.items()}, (dict(batch),))
    )

    def adapt(p: dict[str, Tensor], batches: Batch) -> tuple[dict[str, Tensor], Tensor]:
        first: Tensor | None = None
        squares = {name: torch.zeros_like(value) for name, value in p.items()}
        for step in range(next(iter(batches.values())).shape[0]):
            g, value = differentiate(p, {name: tensor[step] for name, tensor in batches.items()})
            first = value if first is None else first
            if rule == "sgd":
                p = {name: p[name] - lr * g[name] for name in p}
                continue
            squares = {name: SECOND * squares[name] + (1 - SECOND) * g[name] ** 2 for name in p}
            correction = 1 - SECOND ** (step + 1)
            p = {name: p[name] - lr * g[name] / ((squares[name] / correction).sqrt() + EPSILON) for name in p}
        assert first is not None
        return p, first

    start = {name: value.detach() for name, value in trained.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the only attention kernel that knows how to take tasks at once
        ends, firsts = vmap(adapt, in_dims=(None, 0), randomness="different")(start, dict(tasks))
    return {name: value.mean(0).detach() for name, value in ends.items()}, firsts.mean().detach()
