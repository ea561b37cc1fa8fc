"""fit: the only loop that trains a module by gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import msgspec

from lfm.core.config import Config, Meta
from lfm.core.heavy import nn, torch
from lfm.models.device import device as choose
from lfm.train.loop import loop
from lfm.train.state import fingerprint, state_of

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.method import Run
    from lfm.core.model import Batch

R = TypeVar("R")


class Fit(Config, frozen=True):
    """How a module is trained. A method's Config inherits these settings, with its paper's defaults."""

    steps: Annotated[int, Meta(ge=0, description="optimizer steps; 0: as many as `epochs` asks")] = 0
    epochs: Annotated[float, Meta(gt=0, description="passes over the records, where steps is 0")] = 3.0
    batch_size: Annotated[int, Meta(ge=1, description="records a batch")] = 16
    lr: Annotated[float, Meta(gt=0, description="peak learning rate (AdamW)")] = 1e-3
    weight_decay: Annotated[float, Meta(ge=0, description="decoupled weight decay, of matrices only")] = 0.01
    warmup: Annotated[float, Meta(ge=0, lt=1, description="share of the steps in which the rate rises to its peak")] = (
        0.05
    )
    schedule: Annotated[
        Literal["cosine", "linear", "constant"], Meta(description="how the rate falls to 0 after the warm-up")
    ] = "linear"
    clip: Annotated[float, Meta(ge=0, description="largest norm of the gradient; 0: any")] = 1.0
    accumulate: Annotated[int, Meta(ge=1, description="batches whose gradients are averaged before a step")] = 1
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], Meta(description="arithmetic of the forward; auto: bf16 on a GPU that has it")
    ] = "auto"
    checkpoint_every: Annotated[float, Meta(ge=0, description="seconds between checkpoints")] = 60.0


def steps_of(config: Fit, records: int) -> int:
    """Optimizer steps that training on so many records takes."""
    return config.steps or max(1, math.ceil(config.epochs * math.ceil(records / config.batch_size) / config.accumulate))


def rate(config: Fit, step: int, steps: int) -> float:
    """The learning rate of step (0 …): linear warm-up, then constant, or falling to 0 at `steps`."""
    warm = math.ceil(config.warmup * steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    if config.schedule == "constant":
        return config.lr
    left = (steps - step) / (steps - warm)
    return config.lr * (left if config.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


def fit(
    module: nn.Module,
    records: Sequence[R],
    collate: Callable[[Sequence[R]], Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    config: Fit,
    run: Run,
    *,
    name: str = "fit",
    scale: Callable[[str], float] = lambda parameter: 1.0,
    after: Callable[[int], None] | None = None,
) -> tuple[float, ...]:
    """Train the parameters that require gradients, in place, with AdamW (1711.05101); returns each step's loss.

    loss: (module, batch) → mean over the batch, a scalar. scale: the factor on the rate of the parameter so named.
    after: called after each step (a projection, say). Each epoch is one shuffle keyed by (run, name, epoch); its last
    batch holds what is left. Killed and resumed on one machine it gives the same bytes as uninterrupted.
    Raises DivergedError as soon as a loss or gradient is not finite.
    """
    device = choose()
    trained = {key: p for key, p in module.named_parameters() if p.requires_grad}
    assert trained, "no parameter of the module requires a gradient"
    assert len(records), "no records"
    # how often it is kept may change between a kill and its resumption
    start = fingerprint(module, msgspec.structs.replace(config, checkpoint_every=0.0), len(records))
    mode, home = module.training, next(iter(trained.values())).device
    module.to(device).train()
    optimizer = _optimizer(trained, config, scale, device)
    factors = [group["factor"] for group in optimizer.param_groups]
    parameters = list(trained.values())
    steps = steps_of(config, len(records))
    batches = _batches(len(records), config.batch_size, name, run)
    context = _autocast(device, config.precision)

    def advance(step: int) -> Tensor:
        learning_rate = rate(config, step, steps)
        for group, factor in zip(optimizer.param_groups, factors):
            group["lr"] = learning_rate * factor
        optimizer.zero_grad(set_to_none=True)
        total: Tensor | None = None
        for part in range(config.accumulate):
            batch = collate([records[i] for i in batches(step * config.accumulate + part)])
            batch = {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
            with context:
                value = loss(module, batch)
            if config.accumulate > 1:
                value = value / config.accumulate
            value.backward()
            total = value.detach() if total is None else total + value.detach()
        assert total is not None
        if config.clip:
            # ×0 carries an infinite or undefined norm into the loss, where it is noticed
            total = total + 0 * nn.utils.clip_grad_norm_(parameters, config.clip, foreach=True)
        optimizer.step()
        if after is not None:
            with torch.no_grad():
                after(step)
        return total

    state = state_of(module, start, optimizer)
    try:
        return loop(
            advance,
            steps,
            state,
            run,
            name=name,
            every=config.checkpoint_every,
            remedy=lambda step: _remedy(config, rate(config, step, steps)),
        )
    finally:
        optimizer.zero_grad(set_to_none=True)
        module.to(home).train(mode)


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """bf16 arithmetic where asked for; auto: only where the device has it in hardware."""
    cuda = device.type == "cuda"
    narrow = precision == "bf16" or (precision == "auto" and cuda and torch.cuda.is_bf16_supported(False))
    return torch.autocast(device.type, torch.bfloat16) if narrow else nullcontext()


def _remedy(config: Fit, rate: float) -> str:
    others = [", clip=1"] * (not config.clip) + [", precision=fp32"] * (config.precision == "bf16")
    return f"lr={config.lr / 10:.0e} (the rate at that step was {rate:.1e}){''.join(others)}, or a longer warmup"


def _optimizer(
    trained: Mapping[str, nn.Parameter], config: Fit, scale: Callable[[str], float], device: torch.device
) -> torch.optim.AdamW:
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for key, parameter in trained.items():
        # biases, norms' gains and other vectors are not decayed
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((scale(key), decay), []).append(parameter)
    fused = device.type in ("cpu", "cuda") and all(p.is_floating_point() for p in trained.values())
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay, "factor": factor} for (factor, decay), group in groups.items()],
        lr=config.lr,
        fused=fused,
    )


def _batches(records: int, size: int, name: str, run: Run) -> Callable[[int], Sequence[int]]:
    """The b-th batch's record numbers, for any b: nothing but the epoch's permutation is kept."""
    per_epoch = math.ceil(records / size)
    epoch, order = -1, [0]

    def batch(number: int) -> Sequence[int]:
        nonlocal epoch, order
        if number // per_epoch != epoch:
            epoch = number // per_epoch
            order = torch.randperm(records, generator=run.generator(name, "order", epoch)).tolist()
        first = number % per_epoch * size
        return order[first : first + size]

    return batch
