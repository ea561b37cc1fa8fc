"""How the inputs of linear layers lie: XᵀX / rows of each, over whatever data a module is run on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lfm.core.heavy import torch
from lfm.models.device import forward

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch


def grams(module: nn.Module, batches: Iterable[Batch], names: Sequence[str]) -> dict[str, Tensor]:
    """(in, in) fp64 on the CPU for each named linear layer: the mean of x xᵀ over its inputs' rows.

    Rows of padding (attention_mask 0) are left out where the layer's input has the mask's shape. A layer that the data
    never reach, or reach with no row, is left out of the result.
    """
    totals: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    mask: Tensor | None = None

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            kept = x[mask.to(x.device)] if mask is not None and x.shape[:-1] == mask.shape else x
            kept = kept.reshape(-1, kept.shape[-1])
            # fp64 sums: each model's Gram is added to others' of other sizes, and the sum is inverted
            kept = kept.cpu().double() if kept.device.type == "mps" else kept.double()
            product = kept.T @ kept
            totals[name] = totals[name] + product if name in totals else product
            rows[name] = rows.get(name, 0) + len(kept)

        return hook

    handles = [module.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        for batch in batches:
            mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
            with torch.no_grad():
                forward(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.cpu() / rows[name] for name, total in totals.items() if rows[name]}


def scaled(gram: Tensor, scale: float) -> Tensor:
    """The matrix with everything off its diagonal multiplied by `scale`."""
    return gram * scale + torch.diag(gram.diagonal() * (1 - scale))


def solve(moment: Tensor, answer: Tensor, mean: Tensor, ridge: float) -> Tensor:
    """(G + rI)⁻¹ (A + r mean), r a share of G's mean diagonal: of the solutions of G W = A the nearest to the mean."""
    load = ridge * float(moment.diagonal().mean())
    whole = moment + load * torch.eye(len(moment), dtype=moment.dtype)
    factor, failed = torch.linalg.cholesky_ex(whole)
    if int(failed) or not load:  # without a ridge a singular sum may pass for a regular one
        return mean + torch.linalg.pinv(moment, hermitian=True) @ (answer - moment @ mean)
    return torch.cholesky_solve(answer + load * mean, factor)
