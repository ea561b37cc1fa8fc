"""The gradient of a step: the mean over all that its batches score, however many parts and processes they come in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core import launched
from lfm.core.errors import ConfigError
from lfm.core.heavy import torch
from lfm.train import world

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch

UNSCORED = -100


def weight(batch: Batch) -> int:
    """What a loss is the mean over: the scored tokens, where labels are tokens, else the rows."""
    labels = batch.get("labels")
    if labels is not None and labels.ndim == 2 and not labels.is_floating_point():
        return int((labels != UNSCORED).sum())
    return rows(batch)


def rows(batch: Batch) -> int:
    """How many there are; of a batch without tensors, whose loss brings its own, one."""
    return next(iter(batch.values())).shape[0] if batch else 1


def amount(batches: Sequence[Batch]) -> tuple[int, str]:
    """How much these batches are, and of what: tokens, padding among them, or rows of what has none."""
    if "input_ids" in batches[0]:
        return sum(batch["input_ids"].numel() for batch in batches) * launched.size(), "tokens"
    return sum(rows(batch) for batch in batches) * launched.size(), "rows"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """bf16 or fp16 arithmetic where asked for; auto: bf16, only where the device has it in hardware."""
    cuda = device.type == "cuda"
    if precision == "fp16":
        if not cuda:
            raise ConfigError(
                f"precision=fp16 is for a GPU, this trains on {device.type}", fix="precision=bf16, or fp32"
            )
        return torch.autocast(device.type, torch.float16)
    narrow = precision == "bf16" or (precision == "auto" and cuda and torch.cuda.is_bf16_supported(False))
    return torch.autocast(device.type, torch.bfloat16) if narrow else nullcontext()


class Pass(NamedTuple):
    """Records through a module. together: the module among processes. weigh: what a batch's loss is a mean over."""

    together: world.Together
    collate: Callable[[Sequence[Any]], Batch]
    records: Sequence[Any]
    weigh: Callable[[Batch], float]
    context: AbstractContextManager[object]
    device: torch.device
    seen: list[Batch]  # the last batch: what there was no memory for

    def batch(self, records: Sequence[Any]) -> Batch:
        made = self.collate(records)
        self.seen[:] = [made]
        return {key: tensor.to(self.device, non_blocking=True) for key, tensor in made.items()}

    def share(self, chosen: Sequence[Any]) -> tuple[Batch, float]:
        """This process's part of a batch, and its weight; one that has no part takes a record that counts nothing."""
        mine = chosen[launched.rank() :: launched.size()]
        batch = self.batch(mine or chosen[:1])
        return batch, self.weigh(batch) if mine else 0.0

    def gradients(self, parts: Sequence[Sequence[int]], scaler: Any = None) -> tuple[Tensor, tuple[int, str]]:
        """Add the gradient of the mean loss over all parts to the parameters'; the loss, and the tokens read here."""
        alone = len(parts) == 1 and launched.size() == 1
        records = [[self.records[i] for i in part] for part in parts]
        shares = [(self.batch(records[0]), 1.0)] if alone else [self.share(part) for part in records]
        whole: Tensor | None = None
        if not alone:
            whole = self.together.total(torch.tensor(float(sum(w for _, w in shares)), device=self.device)).clamp(min=1)
        total: Tensor | None = None
        for place, (batch, counted) in enumerate(shares):
            last = place == len(shares) - 1
            with nullcontext() if last else self.together.quiet():
                with self.context:
                    value = self.together.loss(batch)
                if whole is not None:
                    value = value * (counted * launched.size() / whole)  # gradients are averaged over the processes
                (value if scaler is None else scaler.scale(value)).backward()
            total = value.detach() if total is None else total + value.detach()
        assert total is not None
        if launched.size() > 1:
            total = self.together.total(total) / launched.size()
        return total, amount([batch for batch, _ in shares])

    def mean(self, records: Sequence[Any], size: int) -> float:
        """The mean loss on these records, without gradients."""
        found, counted = 0.0, 0.0
        for first in range(0, len(records), size):
            batch, many = self.share(records[first : first + size])
            with torch.no_grad(), self.context:
                found += float(self.together.loss(batch)) * many if many else 0 * float(self.together.loss(batch))
            counted += many
        both = self.together.total(torch.tensor([found, counted], dtype=torch.float64, device=self.device))
        return float(both[0] / both[1].clamp(min=1))

    def forwards(self, parts: Sequence[Sequence[int]]) -> Iterator[Callable[[], object]]:
        """Each of these batches through the module, whole, when it is called."""
        for part in parts:
            yield partial(self._forward, [self.records[i] for i in part])

    def _forward(self, records: Sequence[Any]) -> None:
        with self.context:
            self.together.loss(self.batch(records))
