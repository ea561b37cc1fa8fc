"""The processes that train together, as torchrun or `accelerate launch` started them: who they are, what they share.

All of them run the same method on the same inputs; only `fit` divides its work. A process that was not launched is
alone: nothing here then loads or costs anything.
"""

from __future__ import annotations

import atexit
import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.errors import ConfigError
from lfm.core.heavy import torch
from lfm.core.launched import PATIENCE, size
from lfm.models.layers import all_blocks
from lfm.train.called import called

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch


def sharded() -> bool:
    """Whether the launcher asks that each process hold a part of the weights (FSDP2) rather than all of them."""
    if size() == 1 or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ConfigError(f"weights are sharded by FSDP 2, not {version}", fix="accelerate launch --fsdp_version 2 …")
    return True


@cache
def join(kind: str) -> None:
    """Meet the others, on devices of this kind; accelerate chooses how they speak (gloo, nccl, …)."""
    from accelerate import PartialState

    PartialState(cpu=kind == "cpu", timeout=PATIENCE)
    atexit.register(torch.distributed.destroy_process_group)


class Together(NamedTuple):
    """A module among processes. loss: of a batch, through the module that trains. total: a sum over the processes.

    quiet: a context in which gradients are not exchanged yet. settle: puts the trained weights into the original.
    """

    module: nn.Module
    loss: Callable[[Batch], Tensor]
    total: Callable[[Tensor], Tensor]
    quiet: Callable[[], Any]
    settle: Callable[[], None]


@contextmanager
def _at_once() -> Iterator[None]:
    yield


def alone(module: nn.Module, loss: Callable[[nn.Module, Batch], Tensor]) -> Together:
    """One process: everything as it is."""
    return Together(module, lambda batch: loss(module, batch), lambda value: value, _at_once, lambda: None)


def together(module: nn.Module, loss: Callable[[nn.Module, Batch], Tensor], device: torch.device) -> Together:
    """Several processes: gradients averaged (DDP), or weights and gradients held in parts (FSDP2) if so launched."""
    join(device.type)

    def total(value: Tensor) -> Tensor:
        value = value.clone()
        torch.distributed.all_reduce(value)
        return value

    if sharded():
        held = copy.deepcopy(module)  # sharding changes the module's class, hooks and parameters for good
        whole = shard(held, loss, device)

        def settle() -> None:
            trained = {name: full(p) for name, p in held.named_parameters(remove_duplicate=False)}
            with torch.no_grad():
                for name, p in module.named_parameters(remove_duplicate=False):
                    p.copy_(trained[name])
                for name, buffer in module.named_buffers():
                    buffer.copy_(held.get_buffer(name))

        return Together(held, whole, total, _at_once, settle)
    wrapped = torch.nn.parallel.DistributedDataParallel(
        called(module, loss), device_ids=[device.index] if device.index is not None else None,
        find_unused_parameters=True,
    )  # fmt: skip

    def told(batch: Batch) -> Tensor:
        with warnings.catch_warnings():  # that all were used is no news
            warnings.filterwarnings("ignore", message="find_unused_parameters")
            return wrapped(batch)

    return Together(module, told, total, wrapped.no_sync, lambda: None)


def shard(
    module: nn.Module, loss: Callable[[nn.Module, Batch], Tensor], device: torch.device
) -> Callable[[Batch], Tensor]:
    """FSDP2, block by block; by torch itself: accelerate 1.15 shards on accelerators only, and takes DDP on a CPU."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (size(),))
    again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    for block in all_blocks(module):
        fully_shard(module.get_submodule(block), mesh=mesh, reshard_after_forward=again)
    whole = called(module, loss)
    fully_shard(whole, mesh=mesh, reshard_after_forward=again)
    return whole


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process holds a part."""
    whole = getattr(tensor, "full_tensor", None)
    return whole() if whole is not None else tensor


def like(tensor: Tensor, part: Tensor) -> Tensor:
    """Of a whole tensor what this process holds, as it holds `part`."""
    mesh = getattr(part, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(part.device), mesh, part.placements)  # type: ignore[attr-defined]


def agreed(value: bool, device: torch.device) -> bool:
    """What the leader holds to be so."""
    if size() == 1:
        return value
    told = torch.tensor(float(value), device=device)
    torch.distributed.broadcast(told, 0)
    return bool(told)
