"""fit: the only loop that trains a module by gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from lfm.core import launched
from lfm.core.errors import ConfigError
from lfm.core.heavy import nn, torch
from lfm.data.files import Lines
from lfm.data.files import where as where_of
from lfm.models.device import device as choose
from lfm.train import world
from lfm.train.average import Average, first_of, refresh
from lfm.train.batches import Numbers
from lfm.train.gradient import Pass, autocast, weight
from lfm.train.heldout import HeldOut
from lfm.train.loop import loop
from lfm.train.memory import told_of_memory
from lfm.train.metrics import Metrics
from lfm.train.recompute import recomputed
from lfm.train.setting import Fit as Fit
from lfm.train.setting import rate as rate
from lfm.train.setting import steps_of as steps_of
from lfm.train.state import fingerprint, more, state_of
from lfm.train.world import alone, together

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch
    from lfm.core.method import Run

R = TypeVar("R")

SHOWN = 8
"""Records of a failed step that are named."""


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
    dev: Sequence[R] = (),
    weigh: Callable[[Batch], float] = weight,
) -> tuple[float, ...]:
    """Train the parameters that require gradients, in place, with AdamW (1711.05101); returns each step's loss.

    loss: (module, batch) → mean over the batch, a scalar; it reaches the weights through the module it is given.
    scale: the factor on the rate of the parameter so named. after: called after each step (a projection, say). dev:
    held-out records, whose loss is taken after each epoch. weigh: what a batch's loss is the mean over (scored tokens
    or rows), by which batches that make one step are averaged.

    Each epoch is one shuffle keyed by (run, name, epoch); its last batch holds what is left. Killed and resumed on one
    machine it gives the same bytes as uninterrupted. Launched as several processes, they share each batch, and the
    result is that of one process to rounding. Raises DivergedError as soon as a loss or gradient is not finite,
    MemoryLimitError where there is not enough memory.
    """
    device = choose()
    trained = {key: p for key, p in module.named_parameters() if p.requires_grad}
    assert trained, "no parameter of the module requires a gradient"
    run.note(trained=sum(p.numel() for p in trained.values()))
    assert len(records), "no records"
    if config.patience and not len(dev):
        raise ConfigError(
            "patience waits for a better loss on held-out records, and none were given",
            fix="patience=0, or give the method's role for them (dev=FILE, where it has one)",
        )
    # how often it is kept may change between a kill and its resumption
    start = fingerprint(module, msgspec.structs.replace(config, checkpoint_every=0.0), len(records))
    mode, home = module.training, next(iter(trained.values())).device
    module.to(device).train()
    shared = together(module, loss, device) if launched.size() > 1 else alone(module, loss)
    trained = {key: p for key, p in shared.module.named_parameters() if p.requires_grad}
    optimizer = _optimizer(trained, config, scale, device)
    factors = [group["factor"] for group in optimizer.param_groups]
    steps = steps_of(config, len(records))
    batches = _batches(len(records), config.batch_size, name, run)
    per_epoch = max(1, math.ceil(len(records) / config.batch_size) // config.accumulate)
    pass_ = Pass(shared, collate, records, weigh, autocast(device, config.precision), device, [])
    scaler = torch.amp.GradScaler(device.type) if config.precision == "fp16" else None
    facts: list[tuple[float, Tensor | float, tuple[int, str]]] = []

    def chosen(step: int) -> list[Sequence[int]]:
        return [batches(step * config.accumulate + part) for part in range(config.accumulate)]

    def advance(step: int) -> Tensor:
        learning_rate = rate(config, step, steps)
        for group, factor in zip(optimizer.param_groups, factors):
            group["lr"] = learning_rate * factor
        optimizer.zero_grad(set_to_none=True)
        with told_of_memory(shared.module, config, pass_.seen):
            total, count = pass_.gradients(chosen(step), scaler)
            if scaler is not None:
                scaler.unscale_(optimizer)
            norm: Tensor | float = 0.0
            if config.clip:
                norm = world.full(nn.utils.clip_grad_norm_(trained.values(), config.clip, foreach=True))
                if scaler is None:
                    # ×0 carries an infinite or undefined norm into the loss, where it is noticed
                    total = total + 0 * norm
            if scaler is not None:
                scaler.step(optimizer)  # not where the scaled gradient is too large for fp16
                scaler.update()
            else:
                optimizer.step()
        facts.append((learning_rate, norm, count))
        if after is not None:
            with torch.no_grad():
                after(step)
        if average is not None:
            average.update(step)
        if len(dev) and ((step + 1) % per_epoch == 0 or step + 1 == steps):
            held.again()
        return total

    def look() -> float:
        shared.module.eval()
        found = pass_.mean(dev, config.batch_size)
        shared.module.train()
        return found

    def finish() -> None:
        if config.patience:
            held.put()
        elif average is not None:
            average.put()
        if average is not None:
            each = math.ceil(len(records) / config.batch_size)
            refresh(shared.module, pass_.forwards([batches(number) for number in range(each)]))

    metrics = Metrics(run.work, name)

    def told(step: int, value: float) -> str:
        learning_rate, norm, count = facts.pop(0)
        metrics.tell(step, *count, {"loss": value, "rate": learning_rate, "norm": float(norm)})
        return metrics.beside(value)

    state = state_of(shared.module, start, optimizer)
    average = None
    if config.average != "none":
        decay = config.ema_decay if config.average == "ema" else 0.0
        average = Average(trained, decay, first_of(config.average_from, steps))
    given = average.put_in if average is not None else nullcontext
    held = HeldOut(trained, look, partial(run.curve, f"{name} held out"), config.patience, given)
    if average is not None:
        state = more(state, "average", average.aids, average.load)
    if len(dev):
        state = more(state, "held", held.aids, held.load, held.seen)
    if scaler is not None:
        state = more(state, "scaler", partial(_kept, scaler), partial(_loaded, scaler))
    try:
        with recomputed(shared.module) if config.activation_checkpointing else nullcontext():
            return loop(
                advance,
                steps,
                state,
                run,
                name=name,
                every=config.checkpoint_every,
                remedy=lambda step: _remedy(config, rate(config, step, steps)),
                where=lambda step: _where(records, [i for part in chosen(step) for i in part]),
                told=told,
                over=lambda step: held.over(),
                finish=finish,
                begin=metrics.begin,
                agree=True,
            )
    finally:
        metrics.end()
        optimizer.zero_grad(set_to_none=True)
        shared.settle()
        module.to(home).train(mode)


def _kept(scaler: Any) -> dict[str, Tensor]:
    kept = scaler.state_dict()
    return {key: torch.tensor(kept[key]) for key in ("scale", "_growth_tracker")} if kept else {}


def _loaded(scaler: Any, tensors: Mapping[str, Tensor]) -> None:
    if tensors:
        scaler.load_state_dict(scaler.state_dict() | {key: tensor.item() for key, tensor in tensors.items()})


def _where(records: Sequence[Any], chosen: Sequence[int]) -> str:
    """Which records a step was on, as their file or their numbers name them."""
    if isinstance(records, Lines):
        named = [where_of(records, i) for i in sorted(chosen)]
    elif isinstance(records, Numbers):
        named = list(dict.fromkeys(records.where(i) for i in sorted(chosen)))  # pieces of one text have one place
    else:  # rows of several records are told as these
        rows = [records[i] if isinstance(records[i], tuple) else (i,) for i in chosen]
        flat = all(isinstance(n, int) for row in rows for n in row)
        named = [str(n + 1) for n in sorted([n for row in rows for n in row] if flat else chosen)]
    return f"records {', '.join(named[:SHOWN])}{', …' if len(named) > SHOWN else ''}"


def _remedy(config: Fit, rate: float) -> str:
    others = [", clip=1"] * (not config.clip) + [", precision=fp32"] * (config.precision in ("bf16", "fp16"))
    usual = next(f.default for f in msgspec.structs.fields(type(config)) if f.name == "lr")
    lower, told = min((config.lr / 10, ""), (usual, "the default; "))
    return f"lr={lower:.0e} ({told}the rate at that step was {rate:.1e}){''.join(others)}, or a longer warmup"


def _optimizer(
    trained: Mapping[str, nn.Parameter], config: Fit, scale: Callable[[str], float], device: torch.device
) -> torch.optim.AdamW:
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for key, parameter in trained.items():
        # biases, norms' gains and other vectors are not decayed
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((scale(key), decay), []).append(parameter)
    fused = (
        device.type in ("cpu", "cuda")
        and config.precision != "fp16"
        and all(p.is_floating_point() for p in trained.values())
    )
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
