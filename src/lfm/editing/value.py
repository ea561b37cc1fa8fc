"""The value that makes a model say the new object: gradient descent on what one projection adds at the subject."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from lfm.core.config import Config, Meta
from lfm.core.heavy import F, torch
from lfm.editing.keys import projection
from lfm.editing.rows import IGNORED, Rows
from lfm.models import forward

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn


class Search(Config, frozen=True):
    """How a value is searched for. An editor's Config inherits these settings.

    Rate and decay are relative to ‖v₀‖, which differs a hundredfold between models; ROME's (rate .5, decay
    .5·‖δ‖/‖v₀‖², 20 steps) suit one model's. essence, stop and reach are ROME's own.
    """

    steps: Annotated[int, Meta(ge=1, description="most steps of Adam on the value")] = 40
    lr: Annotated[float, Meta(gt=0, description="Adam's rate over ‖v₀‖/√d: a step's length over ‖v₀‖")] = 0.5
    essence: Annotated[float, Meta(ge=0, description="weight of KL on what follows “{subject} is a”")] = 0.0625
    decay: Annotated[float, Meta(ge=0, description="weight of ‖δ‖/‖v₀‖")] = 0.1
    stop: Annotated[float, Meta(ge=0, description="mean NLL of the new object at which the search ends")] = 0.05
    reach: Annotated[float, Meta(gt=0, description="largest ‖δ‖/‖v₀‖")] = 4.0


class Found(NamedTuple):
    """The best value met: δ (out,) fp64 is what is added to the projection's output at the subject's last token.

    probability: of the whole new object, after the bare prompt or in the mean over the others, whichever is less.
    reach: ‖δ‖/‖v₀‖. steps: how many were taken.
    """

    delta: Tensor
    probability: float
    reach: float
    loss: float
    steps: int


@contextmanager
def added(layer: Any, places: tuple[Tensor, Tensor], delta: Tensor) -> Iterator[None]:
    """Within: the layer's output is δ more at these (row, token) places."""

    def hook(_: Any, __: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[places] = out[places] + delta.to(out.dtype)
        return out

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def search(module: nn.Module, block: int, rows: Rows, settings: Search, before: Tensor) -> Found:
    """Minimise NLL(new object) + essence·KL(after ‖ before, on the last row) + decay·‖δ‖/‖v₀‖, ‖δ‖ ≤ reach·‖v₀‖.

    before: v₀ (out,), the output at the first context's subject. The module's parameters must need no gradients.
    NLL is per token; the first context, the bare prompt, weighs as much in it as the others together (in ROME as one
    of them, and a δ that suits all but the prompt itself then passes). Of all steps the δ of the lowest loss is kept.
    """
    _, layer = projection(module, block)
    home = layer.weight.device
    places = torch.arange(len(rows.subject), device=home), rows.subject.to(home)
    norm = before.norm().item()
    delta = torch.zeros(len(before), device=home, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=settings.lr * norm / len(before) ** 0.5)
    essence: Tensor | None = None
    best = Found(delta.detach().double(), 0.0, 0.0, float("inf"), 0)
    for step in range(settings.steps + 1):
        with added(layer, places, delta):
            logits = forward(module, rows.batch)
        told = answer_logprobs(logits, rows)
        lengths = (rows.labels[:-1] != IGNORED).sum(1).to(told)
        now = logits[-1, rows.last[-1]].log_softmax(-1)
        essence = now.detach() if essence is None else essence
        drift = F.kl_div(essence, now, log_target=True, reduction="sum")
        unsaid = both(-told / lengths).mean()
        loss = unsaid + settings.essence * drift + settings.decay * delta.norm() / norm
        if loss.item() < best.loss:
            share = delta.detach().norm().item() / norm
            best = Found(delta.detach().double().clone(), both(told.exp()).min().item(), share, loss.item(), step)
        if unsaid.item() < settings.stop or step == settings.steps:
            break
        (delta.grad,) = torch.autograd.grad(loss, delta)
        optimiser.step()
        with torch.no_grad():
            delta.mul_(min(1.0, settings.reach * norm / max(delta.norm().item(), 1e-30)))
    return best


def both(told: Tensor) -> Tensor:
    """(2,) of (n,) over contexts: the bare prompt's, and the mean over the others; (1,) where there are no others."""
    return torch.stack([told[0], told[1:].mean()]) if len(told) > 1 else told


def answer_logprobs(logits: Tensor, rows: Rows) -> Tensor:
    """(n,) log-probability of the whole new object in each context."""
    labels = rows.labels[:-1, 1:].to(logits.device)
    asked = labels != IGNORED
    told = logits[:-1, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return (told * asked).sum(1)
