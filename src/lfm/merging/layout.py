"""What each tensor of the result is made of: the tensors of the inputs that meet there, by name and by layer.

No architecture is defined: layers are what names number, slices renumber them, and a tensor that some input lacks is an
error, unless that input ties it to one that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec.structs import replace

from lfm.core.errors import ConfigError, LfmError, MismatchError
from lfm.merging.recipe import Module, Recipe, Slice, Source
from lfm.merging.settings import Language, Place
from lfm.tensors.depth import depths
from lfm.tensors.match import some

if TYPE_CHECKING:
    from lfm.core.interfaces import Layout, LazyTensor

    Tensors = Mapping[str, LazyTensor]

IMAGES = ("visual", "vision_tower", "vision_model", "vision_encoder", "vision_embed_tokens", "image_encoder")
BRIDGES = ("multi_modal_projector", "mm_projector", "connector", "merger", "vision_projector")
REST = ("text_decoder", "default", "decoder")
"""Parts of names that mergekit's module names stand for: a vision encoder, what follows it, and all else."""


class Met(NamedTuple):
    """One tensor of the result: the inputs that meet in it (a model, and a name there), and where its settings are.

    layer: (name of the stack, its number in the result, in the first source), where it lies in one.
    """

    sources: tuple[tuple[str, str], ...]
    place: Place
    layer: tuple[str, int, int] | None = None
    module: str = ""


class Kit(NamedTuple):
    """What a recipe's references stand for: tensors and config by model, and what an architecture tells of itself."""

    tensors: Mapping[str, Tensors]
    configs: Mapping[str, Mapping[str, Any]]
    layout: Callable[[str], Layout]
    left_out: tuple[str, ...] = ()


def of_the_architecture(kit: Kit) -> Kit:
    """The kit without what some models store in their blocks though their architecture has no such tensor.

    Older checkpoints hold buffers that are computed today. They are no weights; a merge tells what it left out.
    """
    inside = [depths(tensors) for tensors in kit.tensors.values()]
    odd = {n for own in inside for n in own if any(n not in other for other in inside)}
    if not odd or len({max((d.blocks for d in own.values()), default=0) for own in inside}) > 1:
        return kit
    try:
        odd -= {name for ref in kit.tensors for name in kit.layout(ref).tensors}
    except LfmError:
        return kit
    tensors = {ref: {n: t for n, t in own.items() if n not in odd} for ref, own in kit.tensors.items()}
    return kit._replace(tensors=tensors, left_out=tuple(sorted(odd)))


def lay_out(recipe: Recipe, language: Language, kit: Kit) -> dict[str, Met]:
    """Every tensor of the result by name, in the first source's order. MismatchError for one without counterpart."""
    found: dict[str, Met] = {}
    for name, module, names in _modules(recipe, kit):
        slices = module.slices or _whole(recipe, module, language)
        if module.slices:
            met = _by_slices(recipe, language, kit, name, module, slices, names)
        else:
            met = _by_models(recipe, language, kit, name, module, slices[0], names)
        if twice := found.keys() & met.keys():
            raise ConfigError(f"modules of the recipe share {some(twice)}")
        found |= met
    return found


def _modules(recipe: Recipe, kit: Kit) -> list[tuple[str, Module, Callable[[str], bool]]]:
    """Each module with the names that are its own."""
    every = _names(kit)
    if not recipe.modules:
        whole = Module(slices=recipe.slices, models=recipe.models)
        return [("", whole, lambda name: True)]
    claimed: dict[str, str] = {}
    wanted = sorted(recipe.modules, key=lambda key: (key in REST, key not in BRIDGES))
    for key in wanted:
        words = (key, *(BRIDGES if key in BRIDGES else IMAGES if key in ("vision_tower", "vision_model") else ()))
        rest = key in REST and not any(name.startswith(f"{key}.") for name in every)
        mine = [
            name
            for name in every
            if name not in claimed and (rest or name.startswith(f"{key}.") or set(words) & set(name.split(".")))
        ]
        if not mine:
            raise MismatchError(
                f"module {key!r} of the recipe has no tensors",
                why=f"names here begin with {some({'.'.join(n.split('.')[:2]) for n in every})}",
            )
        claimed |= dict.fromkeys(mine, key)
    left = [name for name in every if name not in claimed]
    keeper = next((key for key in REST if key in recipe.modules), None)
    if left and keeper is None:
        raise MismatchError(
            f"no module of the recipe holds {some(left)}",
            fix="add a module by the name that theirs begin with, or one named default for all the others",
        )
    claimed |= dict.fromkeys(left, keeper or "")
    return [(k, m, lambda name, k=k: claimed.get(name) == k) for k, m in recipe.modules.items()]


def _names(kit: Kit) -> dict[str, None]:
    return {name: None for tensors in kit.tensors.values() for name in tensors}


def _whole(recipe: Recipe, module: Module, language: Language) -> tuple[Slice, ...]:
    """Whole models as one slice; the base is one of them."""
    sources = list(module.models)
    if language.adds_base and recipe.base_model and recipe.base_model not in {s.model for s in sources}:
        sources.append(Source(model=recipe.base_model))
    return (Slice(sources=tuple(sources)),)


def _by_models(
    recipe: Recipe,
    language: Language,
    kit: Kit,
    module: str,
    told: Module,
    part: Slice,
    mine: Callable[[str], bool],
) -> dict[str, Met]:
    base = _base(recipe, part, language)
    tensors = [{n: t for n, t in kit.tensors[s.model].items() if mine(n)} for s in part.sources]
    at: dict[str, float] = {}
    stack: dict[str, tuple[str, int]] = {}
    for counted in _stacks(tensors[0], kit.configs[part.sources[0].model]):
        at |= {name: depth.fraction for name, depth in counted.items()}
        stack |= {name: (_stack(depth.name), depth.block) for name, depth in counted.items()}
    found = {}
    for name in dict.fromkeys(n for each in tensors for n in each):
        names = [_counterpart(name, i, part, tensors, kit) for i in range(len(part.sources))]
        place = _place(recipe, told, part, base, names, name, at.get(name, 0.0))
        layer = (*stack[name], stack[name][1]) if name in stack else None
        found[name] = Met(tuple((s.model, n) for s, n in zip(part.sources, names)), place, layer, module)
    return found


def _by_slices(
    recipe: Recipe,
    language: Language,
    kit: Kit,
    module: str,
    told: Module,
    slices: Sequence[Slice],
    mine: Callable[[str], bool],
) -> dict[str, Met]:
    first = {n: t for n, t in kit.tensors[slices[0].sources[0].model].items() if mine(n)}
    counted = _stacks(first, kit.configs[slices[0].sources[0].model])
    if len({_stack(d.name) for each in counted for d in each.values()}) != 1:
        several = {_stack(d.name) for each in counted for d in each.values()}
        raise MismatchError(
            f"slices need one stack of layers, here are {some(several) or 'none'}",
            fix="name each part under modules:" if several else "",
        )
    stack = _stack(next(iter(counted[0].values())).name)
    inside = {s.model: inside_of(kit.tensors[s.model], stack) for part in slices for s in part.sources}
    found: dict[str, Met] = {}

    def outside(part: Slice, names: Iterable[str]) -> None:
        base = _base(recipe, part, language)
        tensors = [
            {n: t for n, t in kit.tensors[s.model].items() if mine(n) and not n.startswith(f"{stack}.")}
            for s in part.sources
        ]
        for name in names:
            given = [_counterpart(name, i, part, tensors, kit) for i in range(len(part.sources))]
            place = _place(recipe, told, part, base, given, name, 0.0)
            found[name] = Met(tuple((s.model, n) for s, n in zip(part.sources, given)), place, None, module)

    before, after = _around(slices, kit, mine, stack)
    outside(slices[0], before)
    number = 0
    for part in slices:
        base = _base(recipe, part, language)
        length = _length(part.sources[0])
        for step in range(length):
            t = step / (length - 1) if length > 1 else 1.0
            numbers = [(s.layer_range or (0, 0))[0] + step for s in part.sources]
            for source, layer in zip(part.sources, numbers):
                if layer not in inside[source.model]:
                    raise MismatchError(
                        f"{source.model} has no layer {layer}",
                        why=f"{stack} has {len(inside[source.model])}",
                        fix="a slice's layer_range ends before its second number",
                    )
            _same_parts(part, numbers, inside, stack)
            for rest in inside[part.sources[0].model][numbers[0]]:
                names = [f"{stack}.{layer}.{rest}" for layer in numbers]
                made = f"{stack}.{number}.{rest}"
                place = _place(recipe, told, part, base, names, made, t)
                sources = tuple((s.model, n) for s, n in zip(part.sources, names))
                found[made] = Met(sources, place, (stack, number, numbers[0]), module)
            number += 1
    outside(slices[-1], after)
    return found


def _place(
    recipe: Recipe, module: Module, part: Slice, base: int | None, names: Sequence[str], shared: str, t: float
) -> Place:
    wide = (part.parameters, module.parameters, recipe.parameters)
    scopes = tuple((s.parameters, *wide) for s in part.sources)
    return Place(shared, tuple(names), t, base, scopes, wide, tuple(s.model for s in part.sources))


def _base(recipe: Recipe, part: Slice, language: Language) -> int | None:
    """Which of a slice's sources is the base. ConfigError unless their number suits the method."""
    base = part.base_model or recipe.base_model
    named = [s.model for s in part.sources]
    if len(set(named)) < len(named):
        where = "a slice of the recipe" if part.sources[0].layer_range else "the recipe"
        raise ConfigError(f"{where} names {next(n for n in named if named.count(n) > 1)} twice")
    at = named.index(base) if base in named and language.base != "input" else None
    if (language.base in ("required", "first") and at is None) or (language.base == "optional" and base and at is None):
        raise ConfigError(
            f"{recipe.merge_method} needs its base among the sources of every slice" if base else "there is no base",
            why=f"{base} is not in one of them" if base else f"{recipe.merge_method} needs one",
            fix="add it to the slice" if base else "add base_model:",
        )
    count = len(named) - (at is not None)
    if not count and language.passes_base:
        return at
    if count < language.least or (language.most is not None and count > language.most):
        least, most = language.least, language.most
        asked = f"just {least}" if least == most else f"at least {least}" if count < least else f"at most {most}"
        raise ConfigError(
            f"{recipe.merge_method} takes {asked} model{'s' if (most or least) > 1 else ''}"
            f"{' beside the base' if at is not None else ''}, here are {count}",
        )
    return at


def _counterpart(name: str, i: int, part: Slice, tensors: Sequence[Tensors], kit: Kit) -> str:
    """What a source has for a tensor: its own of that name, or the one that it is tied to."""
    if name in tensors[i]:
        return name
    model = part.sources[i].model
    holder = next(ref for ref in (*(s.model for s in part.sources), *kit.tensors) if name in kit.tensors[ref])
    held = kit.tensors[holder]
    outside = name not in depths(held)
    tied = _tied(name, held, tensors[i]) if outside and ties(model, kit) else None
    if tied is None:
        raise MismatchError(
            f"{model} has no tensor {name!r}",
            why=f"{holder} has it, and nothing here is ever dropped"
            + ("; by its config it is tied to no other" if outside else ""),
            fix=_way_out(model, holder, kit),
        )
    return tied


def _way_out(model: str, holder: str, kit: Kit) -> str:
    mine, theirs = (max((d.blocks for d in depths(kit.tensors[ref]).values()), default=0) for ref in (model, holder))
    if mine != theirs:
        return f"they have {mine} and {theirs} layers: say by slices: which of them meet"
    return "merge models of one architecture; for a part of them, name it under modules:"


def ties(model: str, kit: Kit) -> bool:
    """Whether a model ties tensors: by its config, or else by what its architecture does unless told."""
    told = kit.configs[model].get("tie_word_embeddings")
    if told is not None:
        return bool(told)
    try:
        return bool(kit.layout(model).tied)
    except LfmError:
        return False


def _tied(name: str, holder: Tensors, other: Tensors) -> str | None:
    """The tensor that `other` has in place of one it lacks: outside the blocks, the only one shaped alike."""
    inside = depths(other)
    shape = tuple(holder[name].shape)
    like = [n for n in other if n not in inside and n in holder and tuple(holder[n].shape) == shape and len(shape) == 2]
    return like[0] if len(like) == 1 else None


def _stacks(tensors: Tensors, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Depths by stack: the large ones, and smaller ones that have as many blocks as the config says of some part."""
    told = {value for section in sections(config).values() for value in counts(section).values()}
    found, left = [], dict(tensors)
    while counted := depths(left):
        if not found or all(d.blocks in told for d in counted.values()):
            found.append(counted)
        left = {n: t for n, t in left.items() if n not in counted}
    return found


def _stack(block: str) -> str:
    return block.rsplit(".", 1)[0]


def inside_of(tensors: Tensors, stack: str) -> dict[int, list[str]]:
    """Number of a layer → what its tensors are called after it."""
    found: dict[int, list[str]] = {}
    for name in tensors:
        if name.startswith(f"{stack}."):
            number, _, rest = name.removeprefix(f"{stack}.").partition(".")
            if number.isdecimal():
                found.setdefault(int(number), []).append(rest)
    return found


def _same_parts(
    part: Slice, numbers: Sequence[int], inside: Mapping[str, Mapping[int, Sequence[str]]], stack: str
) -> None:
    have = [set(inside[s.model][n]) for s, n in zip(part.sources, numbers)]
    for source, number, names in zip(part.sources, numbers, have):
        if names != have[0]:
            odd = next(iter(sorted(names ^ have[0])))
            raise MismatchError(
                f"layer {numbers[0]} of {part.sources[0].model} does not go with layer {number} of {source.model}",
                why=f"{stack}.*.{odd} is in one only",
                fix="nothing is ever dropped: choose layers of one kind",
            )


def _around(slices: Sequence[Slice], kit: Kit, mine: Callable[[str], bool], stack: str) -> tuple[list[str], list[str]]:
    """Names of the tensors before the layers, which come from the first slice's models, and of those after them."""
    ends = [slices[0], slices[-1]]
    names = [
        n
        for n in dict.fromkeys(n for part in ends for s in part.sources for n in kit.tensors[s.model])
        if mine(n) and not n.startswith(f"{stack}.")
    ]
    if _but_for_layers(ends[0]) == _but_for_layers(ends[1]):
        return names, []
    order = list(kit.layout(slices[0].sources[0].model).tensors)
    block = next((i for i, n in enumerate(order) if n.startswith(f"{stack}.")), None)
    if block is None or any(n not in order for n in names):
        odd = next((n for n in names if n not in order), stack)
        raise MismatchError(
            f"whether {odd} comes before or after the layers is not known",
            why="the first slice and the last one are of other models",
            fix="give both the same sources",
        )
    return [n for n in names if order.index(n) < block], [n for n in names if order.index(n) > block]


def _but_for_layers(part: Slice) -> Slice:
    """All that a slice says of tensors outside the layers."""
    return replace(part, sources=tuple(replace(source, layer_range=None) for source in part.sources))


def _length(source: Source) -> int:
    begin, end = source.layer_range or (0, 0)
    return end - begin


def sections(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """A config and those within it: of its text model, of its vision model."""
    return {"": config, **{key: value for key, value in config.items() if isinstance(value, dict)}}


def counts(config: Mapping[str, Any]) -> dict[str, int]:
    """The entries of a config, or a part of one, that may be a number of layers."""
    named = {k: v for k, v in config.items() if k in ("depth", "n_layer", "n_layers") or k.endswith("_layers")}
    return {key: value for key, value in named.items() if isinstance(value, int) and not isinstance(value, bool)}
