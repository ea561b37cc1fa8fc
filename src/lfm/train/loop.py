"""Steps that can be killed at any moment: resumed, they end in the same bytes.

The caller says what one step does and what it changes; progress, randomness, checkpoints, the loss curve and the watch
for numbers that are not finite are here. `fit` is this loop around a gradient step; a method with an update rule of its
own (meta-learning, a generator against a student) uses it directly.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from lfm.core import launched
from lfm.core.errors import CorruptError, DivergedError, OutputError
from lfm.core.heavy import torch
from lfm.models.device import device as choose
from lfm.train import checkpoint, world
from lfm.train.seeds import seed, seeded
from lfm.train.state import State

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from lfm.core.method import Run

BEGAN: dict[Path, float] = {}
"""When the first training in a run's directory began, in this process: what ends within `every` seconds of it is not
kept, all later ones are, however short, so that a kill undoes no more than that and what it falls into."""

PATIENCE = 16
"""Steps whose losses may wait on an accelerator before they are fetched: fetching each would stop it at each."""


def loop(
    advance: Callable[[int], Tensor],
    steps: int,
    state: State,
    run: Run,
    *,
    name: str,
    every: float = 60.0,
    remedy: Callable[[int], str] = lambda step: "a smaller learning rate",
    where: Callable[[int], str] = lambda step: "",
    told: Callable[[int, float], str] = lambda step, loss: "",
    over: Callable[[int], bool] = lambda step: False,
    finish: Callable[[], None] = lambda: None,
    begin: Callable[[int], None] = lambda step: None,
    agree: bool = False,
) -> tuple[float, ...]:
    """Do advance(0) … advance(steps − 1), each of which returns its loss; returns all losses.

    Step s draws from torch's generators seeded by (run, name, s), so what it draws depends on nothing before it. Every
    `every` seconds the state goes to run.work/name, and in the end, unless the run has trained for less than that.
    A checkpoint that cannot be read is none: the loop begins again, and says so in the run's notes.
    Raises DivergedError at a loss or weight that is not finite, OutputError where the checkpoint there is another
    loop's. remedy, where: what to try then, and on what it was.
    begin: called with the first step to do. told: called with each loss, gives what is shown beside the progress.
    over: asked after each step whether it was the last. finish: called after the last. agree: the state is held
    by all processes together, which keep it at the same steps.
    """
    directory = run.work / name
    device = choose()
    losses: list[float] = []
    waiting: list[Tensor] = []
    says = [""]
    patience = 1 if device.type == "cpu" else PATIENCE

    def settle() -> None:
        if not waiting:
            return
        values = torch.stack(waiting).double().tolist() if len(waiting) > 1 else [waiting[0].item()]
        waiting.clear()
        for value in values:
            if not math.isfinite(value):
                raise _diverged(name, len(losses), f"the loss or its gradient is {value}", remedy, where)
            losses.append(value)
            run.curve(name, value)
            says[0] = told(len(losses) - 1, value)

    def keep(*, done: bool) -> None:
        result = state.result()
        for key, tensor in result.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise _diverged(name, len(losses) - 1, f"{key} holds numbers that are not finite", remedy, where)
        if done and not agreed(time.monotonic() - BEGAN[run.work] >= every):
            return  # sooner done again than kept, with all that this run has trained before
        tensors = {f"result/{key}": tensor for key, tensor in result.items()}
        if not done:
            tensors |= {f"aids/{key}": tensor for key, tensor in state.aids().items()}
        tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
        if launched.leads():
            facts = {"step": len(losses), "steps": steps, "start": state.start, "done": done}
            checkpoint.write(directory, tensors, facts)

    def agreed(value: bool) -> bool:
        return world.agreed(value, device) if agree else value

    try:
        kept = checkpoint.read(directory)
    except CorruptError:  # the same bytes come of beginning anew; what else the run has kept is not lost with it
        kept = None
        run.note(**{f"{name}_began_again": "its checkpoint could not be read"})
    if kept is not None:
        tensors, facts = kept
        if facts["start"] != state.start or facts["steps"] != steps:
            raise OutputError(
                f"the checkpoint in {directory} belongs to another training",
                why="its settings, its data or the weights it began from differ from these",
                fix="use a new run directory, or give each training of a run its own name",
            )
        losses.extend(tensors.pop("losses").tolist())
        state.load({key.split("/", 1)[1]: tensor for key, tensor in tensors.items()})
        for value in losses:
            run.curve(name, value)
        if facts["done"]:
            return tuple(losses)
        for _ in run.track((), f"{name} goes on from step {len(losses)} of {steps} (checkpoint of {_when(directory)})"):
            pass

    begin(len(losses))
    last = time.monotonic()
    BEGAN.setdefault(run.work, last)
    with seeded(run.seed, device), _repeatable(device):
        for step in run.track(range(len(losses), steps), name, steps, lambda: says[0]):
            seed(run.seed_for(name, "step", step), device)
            waiting.append(advance(step))
            now = time.monotonic()
            ended = step + 1 == steps or over(step)
            due = agreed(now - last >= every) and not ended
            if due or len(waiting) >= patience:
                settle()
            if due:
                keep(done=False)
                last = time.monotonic()
            if ended and step + 1 < steps:
                break
        settle()
        finish()
        keep(done=True)
    return tuple(losses)


def _when(directory: Path) -> str:
    """When the checkpoint there was written, by this machine's clock."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((directory / checkpoint.FILE).stat().st_mtime))


def _diverged(
    name: str, step: int, why: str, remedy: Callable[[int], str], where: Callable[[int], str]
) -> DivergedError:
    on = f" on {told}" if (told := where(step)) else ""
    return DivergedError(f"{name} diverged at step {step}{on}", why=why, fix=f"try {remedy(step)}")


class _repeatable:
    """On an accelerator, ask for kernels that give the same sums each time."""

    def __init__(self, device: torch.device) -> None:
        self.wanted = device.type != "cpu"

    def __enter__(self) -> None:
        if self.wanted:
            # cuBLAS adds in one order only with a workspace of fixed size
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            self.strict = torch.are_deterministic_algorithms_enabled()
            self.lenient = torch.is_deterministic_algorithms_warn_only_enabled()
            torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        if self.wanted:
            torch.use_deterministic_algorithms(self.strict, warn_only=self.lenient)
