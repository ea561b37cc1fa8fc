"""Which device modules run on, and the forward pass every caller shares."""

from __future__ import annotations

import inspect
import os
from functools import cache
from typing import TYPE_CHECKING

from lfm.core.errors import ConfigError
from lfm.core.heavy import torch
from lfm.core.interfaces import Batch

if TYPE_CHECKING:
    from torch import Tensor, nn


def device() -> torch.device:
    """LFM_DEVICE if set (cpu, cuda, cuda:1, mps), else the first accelerator, else the CPU."""
    chosen = os.environ.get("LFM_DEVICE", "")
    if chosen and chosen != "auto":
        try:
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"there is no device {chosen!r} here",
                why=str(error).splitlines()[0],
                fix="cpu, cuda, cuda:1 or mps, where the machine has it; auto chooses",
            ) from None
        return torch.device(chosen)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    place = os.environ.get("LOCAL_RANK")  # of several processes on one machine, each its own
    return torch.device("cuda" if place is None else f"cuda:{place}")


INPUTS = ("input_ids", "pixel_values", "input_values", "input_features")
"""What the forward of a module of transformers takes, one of them at least."""


@cache
def taken(forward: type) -> frozenset[str] | None:
    """What the forward of a module of transformers takes, by name; None for another's."""
    parameters = inspect.signature(forward.forward).parameters  # type: ignore[attr-defined]
    return frozenset(parameters) if any(name in parameters for name in INPUTS) else None


def forward(module: nn.Module, batch: Batch) -> Tensor:
    """The module's logits in fp32: (B, T, V) or (B, classes); an encoder's hidden states (B, T, width).

    Keys that the forward does not take are left out, "labels" too: an encoder-decoder without "decoder_input_ids" reads
    them shifted by one place. A module that is not of transformers is
    called with the batch's first tensor.
    """
    inner = module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]
    takes = taken(type(module)) or taken(type(inner))
    where = next(module.parameters()).device
    if takes is None:
        name = "pixel_values" if "pixel_values" in batch else next(iter(batch))
        out = module(batch[name].to(where))
    else:
        given = {k: v.to(where) for k, v in batch.items() if k in takes and k != "labels"}
        if "use_cache" in takes:
            given["use_cache"] = False  # type: ignore[assignment]
        if "decoder_input_ids" in takes and "decoder_input_ids" not in given and "labels" in batch:
            shift = inner.prepare_decoder_input_ids_from_labels  # type: ignore[union-attr]
            given["decoder_input_ids"] = shift(labels=batch["labels"].to(where))  # type: ignore[operator]
        out = module(**given)
    if isinstance(out, torch.Tensor):
        return out.float()
    logits = getattr(out, "logits", None)
    return (out.last_hidden_state if logits is None else logits).float()
