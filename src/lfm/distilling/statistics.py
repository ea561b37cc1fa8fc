"""What a network's own layers say of the data it was trained on: means and variances of what its norms read.

Batch norms remember them (1912.08795). Of other networks they are known where whoever has the data measured them
(`recorded`, kept by `write`), as 1710.07535 asks for; or they are measured on pictures that stand for the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from lfm.core.errors import DataError
from lfm.core.heavy import nn, safetensors, safetensors_torch, torch

if TYPE_CHECKING:
    from pathlib import Path

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


def channels(layer: nn.Module) -> int:
    """Of how many channels a layer that normalises knows a mean and a variance; 0 where it does not say."""
    told = getattr(layer, "num_features", 0) or getattr(layer, "num_channels", 0)
    shape = getattr(layer, "normalized_shape", ()) or getattr(getattr(layer, "weight", None), "shape", ())
    return told or (int(shape[-1]) if shape else 0)


def stored(module: nn.Module) -> dict[str, Moments]:
    """What its batch norms remember of their inputs; empty for a network without."""
    return {
        name: Moments(child.running_mean.detach().clone(), child.running_var.detach().clone())
        for name, child in module.named_modules()
        if isinstance(child, nn.modules.batchnorm._BatchNorm)
        and child.running_mean is not None
        and child.running_var is not None
    }


def laid(layer: nn.Module, activations: Tensor) -> Tensor:
    """What a layer that normalises reads, its channels last (B, …, C): some read them second."""
    second = isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.GroupNorm)
    second = second or getattr(layer, "data_format", "") == "channels_first"  # ConvNeXt's, of transformers
    return activations.movedim(1, -1) if second else activations


def moments(activations: Tensor) -> Moments:
    """Of (B, …, C) over all but the channels. Variances are biased."""
    flat = activations.reshape(-1, activations.shape[-1])
    return Moments(flat.mean(0), flat.var(0, unbiased=False))


@contextmanager
def read(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Moments]]:
    """A mapping that each forward inside the block fills with the moments of what these layers read, differentiable."""
    seen: dict[str, Moments] = {}
    handles = []

    def keep(name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen[name] = moments(laid(layer, given[0]))

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


class Records(NamedTuple):
    """Metadata of a classifier (1710.07535), without a picture of its data: what its layers and its answers were like.

    layers: moments of what its norms read. mean (classes, V), cov (classes, V, V): its logits of each class it told.
    """

    layers: dict[str, Moments]
    mean: Tensor
    cov: Tensor


def recorded(module: nn.Module, forwards: Iterable[Callable[[], Tensor]]) -> Records:
    """Of a classifier's forwards over its data, each of which gives logits (B, V).

    A class that it told of less than two records has the moments of all together.
    """
    told: list[Tensor] = []
    layers = measured(module, ((lambda ask=ask: told.append(ask())) for ask in forwards), norms(module))
    logits = torch.cat(told).double()
    chosen, whole = logits.argmax(-1), (logits.mean(0), torch.cov(logits.T))
    groups = [logits[chosen == c] for c in range(logits.shape[-1])]
    each = [(g.mean(0), torch.cov(g.T)) if len(g) > 1 else whole for g in groups]
    mean, cov = (torch.stack(part).float() for part in zip(*each, strict=True))
    return Records(layers, mean, cov)


def write(records: Records, file: Path) -> None:
    """One safetensors file: LAYER.mean and LAYER.var of each layer, logits.mean and logits.cov by class."""
    tensors = {"logits.mean": records.mean, "logits.cov": records.cov}
    for name, (mean, var) in records.layers.items():
        tensors |= {f"layers.{name}.mean": mean, f"layers.{name}.var": var}
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    safetensors_torch.save_file(kept, str(file))


def opened(file: str | Path) -> Records:
    """What `write` wrote. DataError where there is no such file, or another, or where it holds no finite numbers."""
    try:
        tensors = safetensors_torch.load_file(str(file))
        found = [
            name.removesuffix(".mean") for name in tensors if name.startswith("layers.") and name.endswith(".mean")
        ]
        layers = {name[7:]: Moments(tensors[f"{name}.mean"], tensors[f"{name}.var"]) for name in found}
        return _sound(Records(layers, tensors["logits.mean"], tensors["logits.cov"]))
    except KeyError as error:
        why = f"{error.args[0]} is missing"
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        why = str(error)
    raise DataError(
        f"{file} holds no records of a model's activations",
        why=why,
        fix="whoever has the data makes them: lfm.distilling.statistics.recorded and write",
    )


def _sound(records: Records) -> Records:
    """The same. ValueError where they cannot be a model's."""
    mean, cov = records.mean, records.cov
    if mean.ndim != 2 or cov.shape != (*mean.shape, mean.shape[-1]):
        raise ValueError(f"logits.mean is {list(mean.shape)} and logits.cov {list(cov.shape)}")
    for name, (means, variances) in records.layers.items():
        if means.ndim != 1 or means.shape != variances.shape:
            raise ValueError(f"layers.{name} has means {list(means.shape)} and variances {list(variances.shape)}")
    for name, parts in {"logits": (mean, cov), **records.layers}.items():
        if not all(bool(part.isfinite().all()) for part in parts):
            raise ValueError(f"{name} holds what are no numbers")
    return records


def drawn(records: Records, classes: Tensor) -> Tensor:
    """(n, V) logits as the records say the data of these classes (n,) had: N(μ_c, Σ_c), from torch's own generator."""
    values, vectors = torch.linalg.eigh(records.cov.double())
    roots = vectors * values.clamp(min=0).sqrt()[:, None]
    noise = torch.randn(len(classes), records.mean.shape[-1], 1, dtype=torch.float64)
    own = classes.cpu()
    return (records.mean[own] + (roots[own] @ noise).squeeze(-1)).float().to(classes.device)
