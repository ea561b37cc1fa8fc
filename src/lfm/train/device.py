"""Where training runs: chosen here and nowhere else."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from lfm.core.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.model import Batch


def choose() -> torch.device:
    """The accelerator if there is one, else the CPU; the environment variable LFM_DEVICE overrides."""
    wanted = os.environ.get("LFM_DEVICE", "")
    device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        # cuBLAS repeats its sums in the same order only with a workspace of fixed size
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return device


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """bf16 arithmetic in the forward where asked for; auto: only where the device has it in hardware."""
    wide = precision == "fp32" or (
        precision == "auto" and (device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False))
    )
    return nullcontext() if wide else torch.autocast(device.type, torch.bfloat16)


def move(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch on that device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
