"""LoRA adapters of one base, added up: changes of low rank by their factors, whole tensors as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lfm.core.errors import ConfigError, MismatchError
from lfm.core.heavy import torch
from lfm.core.interfaces import Adaptation, LazyTensor, LowRank, Weights
from lfm.core.model import Model
from lfm.models.lora import fitting, naming

if TYPE_CHECKING:
    from torch import Tensor


class Sum(NamedTuple):
    """What one adapter must hold to do what several did."""

    changes: Mapping[str, LowRank]
    whole: Mapping[str, LazyTensor | Tensor]


def one_base(models: Sequence[Model]) -> Model:
    """The base of all these adapters. MismatchError unless it is the same one, by digest, and they fit it."""
    first = models[0].ask(Adaptation).base
    for model in models[1:]:
        other = model.ask(Adaptation).base
        if other.digest != first.digest:
            raise MismatchError(
                f"{models[0].ref} and {model.ref} adapt different models",
                why=f"{first.ref} has digest {first.digest[:12]}, {other.ref} {other.digest[:12]}",
                fix="adapters add up over one base; merge them into their bases to merge models instead",
            )
    for model in models:
        fitting(first, model.ask(Adaptation).changes(), model.ref)
    return first


def added(models: Sequence[Model], weights: Sequence[float]) -> Sum:
    """Σ wᵢ ΔWᵢ: factors side by side; whole tensors θ as θ₀ + Σ wᵢ (θᵢ − θ₀), where an adapter without one changes
    nothing, or, if the base stores none, as their weighted mean.

    MismatchError naming a module or tensor in which they do not go together.
    """
    from lfm.tensors.lazy import cast
    from lfm.tensors.match import equal

    used = [(model, weight) for model, weight in zip(models, weights, strict=True) if weight]
    if not used:
        raise ConfigError("all weights are zero", fix="leave out the adapters that should not count")
    base = used[0][0].ask(Adaptation).base.ask(Weights)
    stored, stored_name = base.tensors(), naming(base)
    given = [(model.ref, model.ask(Adaptation), weight) for model, weight in used]
    for ref, adaptation, _ in given:
        fitting(adaptation.base, adaptation.changes(), ref)
    changes: dict[str, LowRank] = {}
    for name in _union([adaptation.changes() for _, adaptation, _ in given]):
        those = [(ref, a.changes()[name], weight) for ref, a, weight in given if name in a.changes()]
        changes[name] = _change(name, those)
    whole: dict[str, LazyTensor | Tensor] = {}
    for name in _union([adaptation.whole() for _, adaptation, _ in given]):
        tensors = [(ref, a.whole()[name], weight) for ref, a, weight in given if name in a.whole()]
        module, start = name.removesuffix(".weight"), stored.get(stored_name(name) or "")
        if module in changes and start and all(equal(cast(tensor, start.dtype), start) for _, tensor, _ in tensors):
            continue  # peft keeps embeddings beside their factors, though they are the base's
        whole[name] = _tensor(name, tensors, start, changes.pop(module, None))
    return Sum(changes, whole)


class Overlap(NamedTuple):
    """How alike two changes are. cosine: of the changes themselves; reads: the largest of any two inputs that they act
    on, 1 where one meets all that the other meets (of rank-one edits, that of their keys)."""

    cosine: float
    reads: float


def overlap(one: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> Overlap:
    """Of two changes of one model, over all modules; 0 where they have none in common."""
    shared = [name for name in one if name in other]
    norms = [sum(inner(change, change) for change in changes.values()) ** 0.5 for changes in (one, other)]
    product = sum(inner(one[name], other[name]) for name in shared)
    cosine = product / (norms[0] * norms[1]) if all(norms) else 0.0
    return Overlap(cosine, max((_reads(one[name], other[name]) for name in shared), default=0.0))


def inner(one: LowRank, other: LowRank) -> float:
    """⟨B A, B' A'⟩_F without either product."""
    b: Tensor = one.b.double().T @ other.b.double()
    a: Tensor = one.a.double() @ other.a.double().T
    return float((b * a).sum())


def _reads(one: LowRank, other: LowRank) -> float:
    """cos of the smallest principal angle between the row spaces of A and A'."""
    own, theirs = (torch.linalg.qr(change.a.double().T)[0] for change in (one, other))
    return float(torch.linalg.matrix_norm(own.T @ theirs, 2).clamp(max=1))


def moved(name: str, tensor: LazyTensor | Tensor, base: Model, model: Model) -> Tensor:
    """θ + (θ' − θ₀): a whole tensor of an adapter, carried over from its base to another model."""
    from lfm.tensors.lazy import lazy

    start, now = (w.tensors().get(naming(w)(name) or "") for w in (base.ask(Weights), model.ask(Weights)))
    if start is None or now is None or tuple(start.shape) != tuple(now.shape):
        raise MismatchError(
            f"{name} cannot be carried over from {base.ref} to {model.ref}",
            why="one of them stores no such tensor, or the shapes differ",
        )
    return now.read().double() + lazy(tensor).read().double() - start.read().double()


def _union(given: Sequence[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for names in given for name in names))


def _change(name: str, given: Sequence[tuple[str, LowRank, float]]) -> LowRank:
    from lfm.tensors.lowrank import joined, shape_of

    first_ref, first, weight = given[0]
    for ref, change, _ in given[1:]:
        if shape_of(change) != shape_of(first) or change.transposed != first.transposed:
            raise MismatchError(
                f"{first_ref} and {ref} do not go together",
                why=f"they change {name!r} as {list(shape_of(first))} and as {list(shape_of(change))}",
            )
    if len(given) == 1 and weight == 1:
        return first
    return joined([change for _, change, _ in given], [weight for *_, weight in given])


def _tensor(
    name: str, given: Sequence[tuple[str, LazyTensor, float]], base: LazyTensor | None, change: LowRank | None
) -> LazyTensor | Tensor:
    """One whole tensor of the sum; `change` is what adapters that do not hold it whole add to it."""
    from lfm.tensors.lazy import code_of
    from lfm.tensors.lowrank import delta
    from lfm.tensors.safetensors_file import FLOATING

    first_ref, first, weight = given[0]
    for ref, tensor, _ in given[1:]:
        if tuple(tensor.shape) != tuple(first.shape):
            why = f"{name} is {list(first.shape)} in one and {list(tensor.shape)} in the other"
            raise MismatchError(f"{first_ref} and {ref} do not go together", why=why)
    if any(code_of(tensor) not in FLOATING for _, tensor, _ in given):
        for ref, tensor, _ in given[1:]:
            if not torch.equal(tensor.read(), first.read()):
                why = f"{name} holds whole numbers, which cannot be averaged, and they differ"
                raise MismatchError(f"{first_ref} and {ref} do not go together", why=why)
        return first
    if len(given) == 1 and weight == 1 and change is None:
        return first
    total = sum(weight for *_, weight in given)
    if base is None:
        if change is not None or not total:
            which = "others change it" if change is not None else "the weights sum to zero"
            raise MismatchError(
                f"{name} of {first_ref} cannot be added up", why=f"the base stores no such tensor, and {which}"
            )
        values = [weight / total * tensor.read().double() for _, tensor, weight in given]
        return torch.stack(values).sum(0).to(first.dtype)
    if tuple(base.shape) != tuple(first.shape):
        why = f"{name} is {list(first.shape)}, its base's {list(base.shape)}"
        raise MismatchError(f"{first_ref} does not fit its base", why=why)
    result = base.read().double() * (1 - total)
    for _, tensor, weight in given:
        result += weight * tensor.read().double()
    if change is not None:
        result += delta(change)
    return result.to(first.dtype)
