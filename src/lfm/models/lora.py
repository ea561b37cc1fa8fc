"""LoRA adapters as they are stored: what they change, without a module, and how a change is stored as one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, final

from lfm.core.errors import CorruptError, MismatchError, ModelError
from lfm.core.heavy import torch
from lfm.core.interfaces import Layout, LazyTensor, LowRank, Weights
from lfm.core.model import Model

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.models.adapter import Source

PREFIX = "base_model.model."
VARIANTS = {
    "use_dora": "DoRA's magnitudes scale each row of the sum",
    "use_qalora": "QA-LoRA pools its inputs",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "arrow_config": "Arrow routes among adapters",
    "kasa_config": "KaSA changes the base's spectrum",
    "monteclora_config": "MonteCLoRA samples",
    "use_bdlora": "BD-LoRA's factors are blocks",
    "layer_replication": "its layers are not the base's",
    "target_parameters": "its targets are parameters, not modules",
    "trainable_token_indices": "it replaces single rows of the embeddings",
}
"""Settings of peft's LoRA → why W + BA does not say what they do."""

REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Initialisations that change the base's weights as well: peft repeats them whenever it loads the adapter."""


def inexpressible(config: Mapping[str, Any]) -> str:
    """Why an adapter is no change of low rank; empty where it is one."""
    kind = str(config.get("peft_type") or "an unknown type")
    if kind != "LORA":
        return f"no adaptation: {kind} is not W + BA"
    for name, why in VARIANTS.items():
        if config.get(name):
            return f"no adaptation: {name}: {why}, which W + BA does not say"
    started = str(config.get("init_lora_weights"))
    if started.startswith(REBASED):
        return f"no adaptation: init_lora_weights={started!r} changes the base's weights too; save it converted to LoRA"
    return ""


def scale(config: Mapping[str, Any], module: str, rank: int, ref: str = "the adapter") -> float:
    """α/r, or α/√r. MismatchError where the config has another rank for the module than its file.

    rank_pattern and alpha_pattern are matched as peft does: the first key that, as an expression, ends the name.
    """

    def given(what: str, pattern: str, default: int) -> float:
        for key, value in (config.get(pattern) or {}).items():
            try:
                if re.match(rf"(.*\.)?({key})$", module):
                    return _positive(ref, f"{pattern}[{key!r}]", value)
            except re.error as error:
                raise CorruptError(f"{ref}: {pattern} has {key!r}", why=f"no regular expression: {error}") from None
        return _positive(ref, what, config.get(what, default))

    expected = given("r", "rank_pattern", 8)
    if expected != rank:
        raise MismatchError(
            f"{ref} holds a change of {module!r} of rank {rank}",
            why=f"by its config the rank is {expected:g}, on which the scale of the change rests",
        )
    return given("lora_alpha", "alpha_pattern", 8) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _positive(ref: str, what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CorruptError(f"{ref}: {what} is {value!r}", why="it must be a number above 0")
    return value


@final
class StoredAdaptation:
    """The change that an adapter's file holds."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._parsed: tuple[dict[str, LowRank], dict[str, LazyTensor]] | None = None

    @property
    def base(self) -> Model:
        from lfm.models.adapter import checked

        return checked(self._source)

    def changes(self) -> Mapping[str, LowRank]:
        return self._read()[0]

    def whole(self) -> Mapping[str, LazyTensor]:
        return self._read()[1]

    def _read(self) -> tuple[dict[str, LowRank], dict[str, LazyTensor]]:
        if self._parsed is None:
            self._parsed = _parse(self._source)
        return self._parsed


def _parse(source: Source) -> tuple[dict[str, LowRank], dict[str, LazyTensor]]:
    """The file's tensors by what they are. MismatchError naming one that is none of a LoRA's."""
    from lfm.tensors.lazy import lazy

    halves: dict[str, dict[str, LazyTensor]] = {}
    whole: dict[str, LazyTensor] = {}
    offsets: dict[str, LazyTensor] = {}
    for stored, tensor in source.tensors().items():
        name = stored.removeprefix(PREFIX)
        found = re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(\.weight|\.bias)?", name)
        if found and found[3] == ".bias" and found[2] == "B":
            offsets[found[1]] = lazy(tensor)
        elif found and found[3] != ".bias":
            halves.setdefault(found[1], {})[f"{found[2]}{'' if found[3] else ' of an embedding'}"] = lazy(tensor)
        elif "lora_" in name or not stored.startswith(PREFIX):
            raise MismatchError(f"{source.ref} holds {stored!r}", why="that is no part of W + BA, nor of the base")
        else:
            whole[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = lazy(tensor)
    ranked = {name: _change(source, name, given) for name, given in halves.items()}
    changes = _oriented(source, ranked)
    for name, offset in offsets.items():
        whole[f"{name}.bias"] = _shifted(source, name, offset, whole)
    return changes, whole


def _change(source: Source, name: str, given: Mapping[str, LazyTensor]) -> LowRank:
    from lfm.tensors.lazy import finite

    embedding = any("embedding" in half for half in given)
    a, b = (given.get(half + (" of an embedding" if embedding else "")) for half in "AB")
    if a is None or b is None or len(a.shape) < 2 or len(b.shape) < 2 or b.shape[1] != a.shape[0]:
        shapes = ", ".join(f"{half} {list(tensor.shape)}" for half, tensor in given.items())
        raise MismatchError(
            f"the change of {name!r} in {source.ref} is not a product of two factors",
            why=f"it holds {shapes}" + ("; groups of a convolution are not W + BA" if len(given) == 2 else ""),
        )
    kernel = tuple(a.shape[2:])
    rank = int(a.shape[0])
    scaling = scale(source.config, name, rank, source.ref)
    factor, other = b.read(), a.read()
    if not factor.is_floating_point() or not other.is_floating_point():
        raise MismatchError(f"the change of {name!r} in {source.ref} is stored as whole numbers")
    if not finite(factor) or not finite(other):
        raise CorruptError(f"{source.ref}: the change of {name!r} holds a NaN or an infinity")
    wide = factor.reshape(factor.shape[0], rank)
    if scaling != 1:
        wide = wide.double() * scaling
    return LowRank(wide, other.reshape(rank, -1), embedding, kernel, embedding)


def _oriented(source: Source, changes: dict[str, LowRank]) -> dict[str, LowRank]:
    """Linear changes as their weights are stored. A square one in a model that stores some (in, out) is looked up."""
    base = source.base
    if Weights not in base.gives:
        asked = bool(source.config.get("fan_in_fan_out"))
        return {n: c._replace(transposed=asked) if not c.embedding and not c.kernel else c for n, c in changes.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in base.ask(Weights).tensors().items()}
    stored_name = naming(base.ask(Weights))
    some = any(_stored_in_out(shapes, name) for name in shapes)
    made: dict[str, LowRank] = {}
    layout: Layout | None = None
    for name, change in changes.items():
        made[name] = change
        stored = stored_name(f"{name}.weight")
        if change.embedding or change.kernel or stored is None:
            continue
        size = (int(change.b.shape[0]), int(change.a.shape[1]))
        turned = shapes[stored] == size[::-1]
        if turned and size[0] == size[1]:
            turned = False
            if some:
                layout = layout or base.ask(Weights).layout()
                turned = layout.kinds.get(name) == "conv1d"
        made[name] = change._replace(transposed=turned)
    return made


def _stored_in_out(shapes: Mapping[str, tuple[int, ...]], name: str) -> bool:
    """Whether the bias beside a matrix is as long as its second side, and not its first."""
    bias = shapes.get(f"{name.removesuffix('.weight')}.bias")
    shape = shapes[name]
    return name.endswith(".weight") and len(shape) == 2 and bias is not None and shape[0] != bias[0] == shape[1]


def _shifted(source: Source, name: str, offset: LazyTensor, whole: Mapping[str, LazyTensor]) -> LazyTensor:
    """The layer's bias with what lora_bias adds to it, scaled as BA is."""
    from lfm.tensors.lazy import Whole

    bias = whole.get(f"{name}.bias")
    if bias is None and Weights in source.base.gives:
        weights = source.base.ask(Weights)
        bias = weights.tensors().get(naming(weights)(f"{name}.bias") or "")
    if bias is None:
        raise MismatchError(
            f"{source.ref} adds a bias to {name!r}, which has none",
            why="lora_bias=true over a layer without a bias cannot be said in the base's weights",
        )
    before, rank = bias, next(t.shape[1] for n, t in source.tensors().items() if n.endswith(f"{name}.lora_B.weight"))
    scaling = scale(source.config, name, int(rank), source.ref)
    return Whole(tuple(before.shape), offset.dtype, lambda: before.read().double() + scaling * offset.read().double())


def naming(weights: Weights) -> Callable[[str], str | None]:
    """A tensor's name in the module → the name that the checkpoint stores it by: as it is, without the head model's
    prefix, or as transformers renames it. None where it stores none.
    """
    stored = weights.tensors()
    renamed: list[Mapping[str, str]] = []

    def found(name: str) -> str | None:
        short = name.partition(".")[2]
        if name in stored or short in stored:
            return name if name in stored else short
        if not renamed:
            try:
                renamed.append(weights.layout().renamed)
            except ModelError:  # of an architecture that is not known
                renamed.append({})
        other = renamed[0].get(name, "")
        return other if other in stored else None

    return found


def unstored(weights: Weights) -> Callable[[str], str]:
    """The way back: a tensor's name in the checkpoint → in the module."""
    stored = weights.tensors()
    try:
        layout = weights.layout()
    except ModelError:
        return lambda name: name
    known = {other: name for name, other in layout.renamed.items()}
    parts = [module.partition(".") for module in layout.kinds]
    roots = {root for root, *_ in parts}
    short = [r for r, _, rest in parts if f"{r}.{rest}.weight" not in stored and f"{rest}.weight" in stored]
    prefix = f"{short[0]}." if short else ""
    return lambda name: known.get(name) or (name if name.partition(".")[0] in roots else prefix + name)


def placed(base: Model, changes: Iterable[str], whole: Iterable[str]) -> bool:
    """Whether the base stores, under names of its own, all that an adapter names."""
    stored_name = naming(base.ask(Weights))
    absent = [name for name in (*(f"{name}.weight" for name in changes), *whole) if stored_name(name) is None]
    return not absent or base.ask(Weights).layout().tied.keys() >= set(absent)


def fitting(base: Model, changes: Mapping[str, LowRank], ref: str) -> None:
    """MismatchError naming a layer that an adapter changes and the base lacks or has in another shape; none is read."""
    weights = base.ask(Weights)
    stored_name, absent = naming(weights), []
    for name, change in changes.items():
        stored = stored_name(f"{name}.weight")
        if stored is None:
            absent.append(name)
        else:
            _shaped(stored, base, change, ref)
    if not absent:
        return
    try:
        layout = weights.layout()
    except ModelError:
        return  # of an architecture that is not known
    within = [*layout.tensors, *layout.renamed]
    lacks = [n for n in absent if n not in layout.kinds and not any(name.startswith(f"{n}.") for name in within)]
    if lacks:
        more = f" and {len(lacks) - 1} more" if len(lacks) > 1 else ""
        raise MismatchError(
            f"{ref} does not fit {base.ref}",
            why=f"it changes {lacks[0]!r}{more}, and {base.facts.architecture or 'that'} has no such layer",
            fix="give the adapter the base it was made for, or one of that architecture",
        )


def _shaped(stored: str, base: Model, change: LowRank, ref: str) -> None:
    from lfm.tensors.lowrank import shape_of

    shape = tuple(base.ask(Weights).tensors()[stored].shape)
    if shape != shape_of(change):
        raise MismatchError(
            f"{ref} does not fit {base.ref}", why=f"{stored} is {list(shape)}, its change {list(shape_of(change))}"
        )


def patched(
    base: Model, changes: Mapping[str, LowRank], whole: Mapping[str, LazyTensor], ref: str
) -> dict[str, LazyTensor]:
    """The base's tensors that an adapter changes, each computed as it is read. MismatchError where they do not fit.

    A tensor that the adapter both holds whole and changes is what it holds, with the change added.
    """
    from lfm.tensors.lazy import cast
    from lfm.tensors.lowrank import Plus
    from lfm.tensors.match import equal

    tensors, stored_name = base.ask(Weights).tensors(), naming(base.ask(Weights))
    tied: Mapping[str, str] = {}
    absent = any(stored_name(name) is None for name in (*(f"{name}.weight" for name in changes), *whole))
    if absent or any(change.embedding for change in changes.values()):
        tied = base.ask(Weights).layout().tied
    made: dict[str, LazyTensor] = {}
    for name, tensor in whole.items():
        stored = stored_name(tied.get(name, name))
        if stored is None or tuple(tensors[stored].shape) != tuple(tensor.shape):
            has = "has no such tensor" if stored is None else f"has it as {list(tensors[stored].shape)}"
            raise MismatchError(f"{ref} does not fit {base.ref}", why=f"{name} {list(tensor.shape)}: that {has}")
        given = cast(tensor, tensors[stored].dtype)
        if (name in tied or name in tied.values()) and not name.endswith(".bias"):  # a bias is set in place, for both
            if equal(given, tensors[stored]):
                continue  # peft keeps embeddings beside their factors, though they are the base's
            raise _tie(ref, base.ref, name)
        made[stored] = given
    changed: dict[str, LazyTensor] = {}
    for name, change in changes.items():
        stored = stored_name(tied.get(f"{name}.weight", f"{name}.weight"))
        if stored is None:
            raise MismatchError(f"{ref} does not fit {base.ref}", why=f"that has no tensor '{name}.weight'")
        _shaped(stored, base, change, ref)
        _whole_tie(name, changes, tied, ref, base.ref)
        if stored not in changed:
            changed[stored] = Plus(stored, made.get(stored, tensors[stored]), change)
    return made | changed


def _whole_tie(name: str, changes: Mapping[str, LowRank], tied: Mapping[str, str], ref: str, base: str) -> None:
    """MismatchError where a change is made to one of two tied layers, or another to each."""
    from lfm.tensors.lowrank import shape_of

    weight = f"{name}.weight"
    home = tied.get(weight, weight)
    group = {home, *(other for other, stored in tied.items() if stored == home)}
    if len(group) == 1:
        return
    others = [changes.get(other.removesuffix(".weight")) for other in group]
    first = changes[name]
    if any(o is None or shape_of(o) != shape_of(first) or not _equal(o, first) for o in others):
        raise _tie(ref, base, weight)


def _tie(ref: str, base: str, name: str) -> MismatchError:
    return MismatchError(
        f"{ref} cannot be merged into {base}",
        why=f"the base ties {name!r} to another layer's weight, and the adapter changes one of the two",
        fix="keep it as an adapter: served beside the base it means what it was trained to",
    )


def _equal(a: LowRank, b: LowRank) -> bool:
    from lfm.tensors.lowrank import delta

    if torch.equal(a.b, b.b) and torch.equal(a.a, b.a) and a.transposed == b.transposed:
        return True
    if torch.equal(a.b, b.a.T) and torch.equal(a.a, b.b.T) and a.transposed != b.transposed:
        return True  # an embedding's, and a linear layer's
    return bool(torch.equal(delta(a), delta(b)))


def settings(
    changes: Mapping[str, LowRank], whole: Mapping[str, Any], stored: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor | LazyTensor]]:
    """peft's config and tensors that make these changes, with α = r everywhere. MismatchError for what peft cannot say.

    stored: the base's tensors, of which those beside a whole one go along: peft keeps modules, not tensors.
    """
    ranks = {name: int(change.a.shape[0]) for name, change in changes.items()}
    rank = max(ranks.values(), default=1)
    pattern = {f"^{name}": r for name, r in sorted(ranks.items()) if r != rank}
    tensors: dict[str, Tensor | LazyTensor] = {}
    for name, change in changes.items():
        tensors |= _factors(name, change)
    modules = {n.rpartition(".")[0] for n in whole if not n.endswith(".bias")}
    biased = [n for n in whole if n.rpartition(".")[0] not in modules]
    for name in whole:
        if why := unsayable(name, changes, stored):
            raise MismatchError(f"no PEFT adapter holds {name!r}", why=why)
    for module in sorted(modules):
        for name in sorted({n for n in (*whole, *stored) if n.rpartition(".")[0] == module}):
            tensors[f"{PREFIX}{name}"] = whole.get(name, stored.get(name))
    for name in biased:
        module = name.removesuffix(".bias")
        tensors[f"{PREFIX}{module}.base_layer.bias" if module in changes else f"{PREFIX}{name}"] = whole[name]
    alone = all(name.removesuffix(".bias") in changes for name in biased)
    linear = [c for c in changes.values() if not c.embedding and not c.kernel]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": ("lora_only" if alone else "all") if biased else "none",
        "modules_to_save": sorted(modules) or None,
        "target_modules": sorted(changes),
        "fan_in_fan_out": any(change.transposed for change in linear),
        "inference_mode": True,
    }, tensors


def _factors(name: str, change: LowRank) -> dict[str, Tensor]:
    """A and B as peft stores those of a linear layer, an embedding or a convolution."""
    a, b = change.a.float(), change.b.float()
    if change.kernel:
        a, b = a.reshape(len(a), -1, *change.kernel), b.reshape(*b.shape, *(1 for _ in change.kernel))
    half = "lora_embedding_{}" if change.embedding else "lora_{}.weight"
    return {f"{PREFIX}{name}.{half.format(which)}": value.contiguous() for which, value in (("A", a), ("B", b))}


def unsayable(name: str, changes: Iterable[str], stored: Iterable[str]) -> str:
    """Why no PEFT adapter holds this tensor whole; empty where one can."""
    module, _, last = name.rpartition(".")
    if not module:
        return "it belongs to no module within the model"
    if last == "bias":
        return ""
    if module in changes:
        return "its module has a change of low rank too"
    if any(other.startswith(f"{module}.") and "." in other[len(module) + 1 :] for other in (*stored, *changes)):
        return f"{module} holds other modules"
    return ""
