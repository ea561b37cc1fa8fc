"""What a network's own layers say of the data it was trained on: means and variances of what its norms read.

Batch norms remember them (1912.08795). Of other networks they are known where who published the model measured them
(`measured`, kept by `write`), as 1710.07535 asks for. A transformer by itself tells less: that real pictures have
patches unlike one another (`diversity`, 2203.02250).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from lfm.core.heavy import F, nn, torch
from lfm.models import structure

if TYPE_CHECKING:
    from torch import Tensor


class Moments(NamedTuple):
    """mean, var: of each channel, (C,)."""

    mean: Tensor
    var: Tensor


def norms(module: nn.Module) -> list[str]:
    """Names of the layers that normalise: batch norms, layer norms and what is built like them, group norms."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    return [
        name
        for name, child in module.named_modules()
        if isinstance(child, kinds) or type(child).__name__.endswith("RMSNorm")
    ]


def stored(module: nn.Module) -> dict[str, Moments]:
    """What its batch norms remember of their inputs; empty for a network without."""
    return {
        name: Moments(child.running_mean.detach().clone(), child.running_var.detach().clone())
        for name, child in module.named_modules()
        if isinstance(child, nn.modules.batchnorm._BatchNorm)
        and child.running_mean is not None
        and child.running_var is not None
    }


def moments(activations: Tensor, last: bool) -> Moments:
    """Over all but the channels, which are the last axis (B, …, C), or the second (B, C, …). Variances are biased."""
    flat = (activations if last else activations.movedim(1, -1)).reshape(-1, activations.shape[-1 if last else 1])
    return Moments(flat.mean(0), flat.var(0, unbiased=False))


@contextmanager
def read(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Moments]]:
    """A mapping that each forward inside the block fills with the moments of what these layers read, differentiable."""
    seen: dict[str, Moments] = {}
    handles = []

    def keep(name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        last = not isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.GroupNorm)
        seen[name] = moments(given[0], last)

    for name in names:
        handles.append(module.get_submodule(name).register_forward_pre_hook(partial(keep, name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def distance(known: Mapping[str, Moments], seen: Mapping[str, Moments]) -> Tensor:
    """Σ over layers ‖μ − μ̂‖₂ + ‖σ² − σ̂²‖₂ (1912.08795), a scalar; 0 where all are the same."""
    parts = [
        torch.linalg.vector_norm(seen[name].mean - mean) + torch.linalg.vector_norm(seen[name].var - var)
        for name, (mean, var) in known.items()
    ]
    return torch.stack(parts).sum()


@contextmanager
def matched(module: nn.Module, known: Mapping[str, Moments]) -> Iterator[Callable[[], Tensor]]:
    """A function that tells, after each forward inside the block, how far its activations were from these moments.

    Zero where none are known.
    """
    with read(module, known) as seen:
        yield lambda: distance(known, seen) if known else torch.zeros(())


def measured(module: nn.Module, forwards: Iterable[Callable[[], object]], names: Iterable[str]) -> dict[str, Moments]:
    """The moments of what these layers read over all forwards together; batches count alike."""
    each: dict[str, list[Moments]] = {name: [] for name in names}
    with torch.no_grad(), read(module, each) as seen:
        for forward in forwards:
            forward()
            for name, kept in each.items():
                kept.append(seen[name])
    found: dict[str, Moments] = {}
    for name, kept in each.items():
        means, variances = (torch.stack(part) for part in zip(*kept, strict=True))
        found[name] = Moments(means.mean(0), variances.mean(0) + means.var(0, unbiased=False))
    return found


POINTS = 10
"""Where the density of similarities is taken between their least and greatest, as the authors' code has it."""


def diversity(patches: Tensor, width: float = 0.01) -> Tensor:
    """Differential entropy of the patches' cosine similarities (B, P, d), mean over pictures, in nats (2203.02250).

    By a Gaussian kernel density of that width at ten points between the batch's least and greatest similarity. Real
    pictures have patches alike and unlike, and so more of it than noise, whose patches are all alike.
    """
    unit = F.normalize(patches.float(), dim=-1)
    alike = (unit @ unit.mT).flatten(1)
    low, high = (alike.detach().min(), alike.detach().max())
    points = low + (high - low) * torch.linspace(0, 1, POINTS, device=patches.device)
    kernel = torch.exp(-((points[None, :, None] - alike[:, None]) ** 2) / (2 * width**2))
    density = kernel.mean(-1) / (width * math.sqrt(2 * math.pi)) + 1e-4
    return torch.trapezoid(-density * density.log(), points, dim=-1).mean()


@contextmanager
def diverse(module: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """A function that tells, after each forward inside the block, Σ over blocks of the attention outputs' diversity.

    The class token, where there is one more token than a square of patches has, is left out. ModelError where no stack
    of blocks with attention is found.
    """
    many = len(structure.blocks(module))
    with structure.watch(module, [("attention_out", i) for i in range(many)]) as seen:
        yield lambda: torch.stack([diversity(_patches(tokens)) for tokens in seen]).sum()


def _patches(tokens: Tensor) -> Tensor:
    extra = tokens.shape[1] - math.isqrt(tokens.shape[1]) ** 2
    return tokens[:, extra:]
