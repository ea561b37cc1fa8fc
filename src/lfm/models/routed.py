"""Layers whose weights are mixed for each input, or token: W(x) = W₀ + Σᵢ λᵢ(x) ΔWᵢ, changes whole or of low rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lfm.core.heavy import nn, torch
from lfm.core.interfaces import Gradients
from lfm.core.model import Model
from lfm.models import layers, structure
from lfm.models.device import device
from lfm.models.mixing import load_into, matched, parameters_of

if TYPE_CHECKING:
    from torch import Tensor


def ffns(module: nn.Module) -> dict[str, list[str]]:
    """Block → names of the linear layers of its feed-forward layer."""
    found = {}
    for block in layers.all_blocks(module):
        outside = set(structure.attention(module, block))
        inside = [f"{block}.{name}" for name, *_ in structure.linears(module.get_submodule(block))]
        found[block] = [name for name in inside if name not in outside]
    return found


def routers(
    module: nn.Module, count: int, start: float, random: torch.Generator, spread: float = 0.01
) -> nn.ModuleList:
    """One router a block: two linear layers with a ReLU between, whose answer begins near `start` for all."""
    made = nn.ModuleList()
    for block in ffns(module):
        width = structure.feed_forward(module, block).width
        first, second = nn.Linear(width, width), nn.Linear(width, count)
        with torch.no_grad():
            for layer in (first, second):
                layer.weight.normal_(0.0, spread, generator=random)
            first.bias.zero_()
            second.bias.fill_(start)
        made.append(nn.Sequential(first, nn.ReLU(), second))
    return made


def routed(base: Model, models: Sequence[Model], gates: nn.ModuleList, share: float) -> nn.Module:
    """The base's module with `share` of the models' summed changes everywhere but in its blocks' feed-forward layers.

    Those mix the changes by what the gates say of the layer's input, averaged over an input's tokens (padding left
    out): λ (B, N). Gradients reach the gates and nothing else. On `device()`, where the gates must be too.
    """
    module = base.ask(Gradients).module()
    before = {name: value.clone() for name, value in parameters_of(module).items()}
    inside = {name: place for place, names in enumerate(ffns(module).values()) for name in names}
    kept = {f"{name}.{part}": (name, part) for name in inside for part in ("weight", "bias")}
    sums = {name: torch.zeros_like(value) for name, value in before.items() if name not in kept}
    changes: dict[str, dict[str, list[Tensor]]] = {name: {} for name in inside}
    for model in models:
        for name, value in matched(model.ask(Gradients).module(), before, model.ref).items():
            if name in sums:
                sums[name] += value - before[name]
            else:
                layer, part = kept[name]
                changes[layer].setdefault(part, []).append(value - before[name])
    load_into(module, {name: before[name] + share * value for name, value in sums.items()})
    module.to(device()).requires_grad_(False)
    _attach(
        module, inside, {n: {k: torch.stack(v).to(device()) for k, v in c.items()} for n, c in changes.items()}, gates
    )
    return module


def _attach(
    module: nn.Module, inside: Mapping[str, int], changes: Mapping[str, Mapping[str, Tensor]], gates: nn.ModuleList
) -> None:
    seen: dict[Any, Any] = {}

    def begin(_: nn.Module, args: Any, given: dict[str, Any]) -> None:
        seen["mask"] = given.get("attention_mask")

    def mix(name: str) -> Any:
        place, change = inside[name], changes[name]
        turned = structure.transposed(module.get_submodule(name))
        reads = change["weight"].shape[1 if turned else 2]

        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            x = args[0]
            if reads == gates[place][0].in_features:  # type: ignore[index]  # up and gate; down goes by what they saw
                seen[place] = token_mean(gates[place](x), seen.get("mask"))
            shares = seen[place]
            rows = x.reshape(len(shares), -1, reads)
            weights = torch.tensordot(shares, change["weight"], dims=1)  # (B, out, in): one product an input
            more = rows @ (weights if turned else weights.mT)
            if "bias" in change:
                more = more + (shares @ change["bias"])[:, None]
            return out + more.reshape(out.shape)

        return hook

    module.register_forward_pre_hook(begin, with_kwargs=True)
    for name in inside:
        module.get_submodule(name).register_forward_hook(mix(name))


def token_mean(told: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, N) → (B, N) over the tokens that are no padding."""
    if mask is None or mask.shape != told.shape[:-1]:
        return told.mean(1)
    share = mask.to(told.dtype)[..., None]
    return (told * share).sum(1) / share.sum(1).clamp(min=1)


def low_rank(
    module: nn.Module, start: Mapping[str, Tensor], models: Iterable[Model], rank: int, gate: int = 0
) -> dict[str, Tensor]:
    """Every model's change from `start` at the module's linear layers, stacked over models, by LAYER.KEY.

    write (N, out, rank) and read (N, rank, in), whose product is the change's best approximation; bias (N, out); and
    with `gate` its first directions, gate (N, gate, in), orthonormal, zero where nothing changed.
    """
    turned = {name: structure.transposed(layer) for name, layer, *_ in structure.linears(module)}
    turned = {name: value for name, value in turned.items() if f"{name}.weight" in start}
    kept: dict[str, list[Tensor]] = {}
    for model in models:
        for name, value in matched(model.ask(Gradients).module(), start, model.ref).items():
            layer, _, part = name.rpartition(".")
            if layer in turned:
                change = value - start[name]
                if part == "weight":
                    found = directions(change.T if turned[layer] else change, rank, gate)
                else:
                    found = {part: change}
                for key, tensor in found.items():
                    kept.setdefault(f"{layer}.{key}", []).append(tensor)
    return {key: torch.stack(tensors).contiguous() for key, tensors in kept.items()}


def directions(change: Tensor, rank: int, gate: int = 0) -> dict[str, Tensor]:
    """write, read (and gate) of one change (out, in)."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    found = {"write": u[:, :rank], "read": s[:rank, None] * v[:rank]}
    return found | ({"gate": v[:gate] * (s[:gate, None] > 0)} if gate else {})


Shares = Callable[[Mapping[str, "Tensor"], "Tensor"], "Tensor"]
"""(a layer's tensors by key, its input (…, in)) → how much of each model's change every row gets, (rows, N)."""


def add_changes(module: nn.Module, tensors: Mapping[str, Tensor], shares: Shares) -> None:
    """From now on the layers of `low_rank` add their changes, in the shares that are told. On `device()`."""
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        here = {key: tensors[f"{name}.{key}"].to(device()) for key in KEYS if f"{name}.{key}" in tensors}
        module.get_submodule(name).register_forward_hook(_adding(here, shares))


KEYS = ("write", "read", "gate", "bias")


def _adding(here: Mapping[str, Tensor], shares: Shares) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        rows, given = args[0].reshape(-1, args[0].shape[-1]), shares(here, args[0])
        more = torch.zeros(len(rows), out.shape[-1], dtype=out.dtype, device=out.device)
        for place in range(given.shape[1]):
            taken = given[:, place].nonzero()[:, 0]
            if len(taken):
                answer = rows[taken] @ here["read"][place].T @ here["write"][place].T
                answer = answer + here["bias"][place] if "bias" in here else answer
                more.index_add_(0, taken, given[taken, place, None] * answer)
        return out + more.reshape(out.shape)

    return hook
