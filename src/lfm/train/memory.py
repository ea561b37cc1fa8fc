"""Out of memory, told as what would fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lfm.core.errors import MemoryLimitError
from lfm.core.heavy import torch
from lfm.core.model import Facts
from lfm.models import structure
from lfm.models.layers import all_blocks
from lfm.train.cost import memory, smaller

if TYPE_CHECKING:
    from torch import nn

    from lfm.core.interfaces import Batch
    from lfm.train.setting import Fit

SIGNS = ("out of memory", "can't allocate memory", "not enough memory")
"""What torch says of it, on its devices."""


@contextmanager
def told_of_memory(module: nn.Module, config: Fit, seen: Sequence[Batch]) -> Iterator[None]:
    """Inside, running out of memory is a MemoryLimitError that says what would fit. seen: the batch it was on, if any.

    What would fit goes by the estimate that `lfm plan` prints, into what the device has (a GPU), else into half.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        said = str(error)
        if isinstance(error, RuntimeError) and not any(sign in said.lower() for sign in SIGNS):
            raise
        facts, trained = facts_of(module), sum(p.numel() for p in module.parameters() if p.requires_grad)
        length = max((max(t.shape[1], 1) for b in seen for name, t in b.items() if name == "input_ids"), default=1)

        def needed(settings: Fit) -> int:
            return memory(settings, facts, settings.batch_size * length, trained)

        device = next(module.parameters()).device
        limit = 0.9 * torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0.5 * needed(config)
        fix = smaller(config, needed, min(limit, 0.9 * needed(config)))
    else:
        return
    # torch's allocator puts the place in its own code first
    first = (said.strip().splitlines() or ["no more"])[0].split("DefaultCPUAllocator: ")[-1]
    raise MemoryLimitError(
        f"there is not enough memory for batch_size={config.batch_size} of {length} tokens",
        why=f"by estimate a step takes {needed(config) / 1e6:.0f} MB; {first}",
        fix=fix,
    )


def facts_of(module: nn.Module) -> Facts:
    """What the estimate rests on, of a module: its parameters, depth, width and vocabulary."""
    blocks = all_blocks(module)
    inner = list(structure.linears(module.get_submodule(blocks[0]))) if blocks else []
    config = getattr(module, "config", None)
    vocabulary = int(getattr(config, "vocab_size", 0) or 0)
    return Facts(
        task="causal-lm" if vocabulary else "",
        parameters=sum(p.numel() for p in module.parameters()),
        layers=len(blocks),
        width=min((width for _, _, width, _ in inner), default=1),
        vocabulary=vocabulary,
    )
