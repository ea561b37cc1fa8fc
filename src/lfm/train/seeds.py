"""What torch itself draws from its global generators (dropout, initial weights): seeded by key, and fenced in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lfm.core.heavy import torch


def seed(value: int, device: torch.device | None = None) -> None:
    """Seed torch's CPU generator and that device's. For use inside `seeded` only."""
    torch.default_generator.manual_seed(value)
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(value)


@contextmanager
def seeded(value: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside, torch draws from this seed; afterwards its global generators are as they were."""
    accelerators = [device.index or 0] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=accelerators):
        seed(value, device)
        yield
