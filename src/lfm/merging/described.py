"""The result's config: as many layers as the slices made, and nothing tied that is stored apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lfm.core.errors import LfmError, MismatchError
from lfm.core.interfaces import LazyTensor, Weights
from lfm.merging.layout import IMAGES, Kit, Met, counts, inside_of, sections
from lfm.merging.recipe import Recipe
from lfm.tensors.depth import NUMBER, depths


def resized(recipe: Recipe, met: Mapping[str, Met], config: Mapping[str, Any], kit: Kit) -> dict[str, Any]:
    """The config with as many layers as the slices made, and its lists with one entry a layer in their order.

    MismatchError where no number in it is that of the layers.
    """
    made: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in config.items()}
    if not made:
        return made
    cut = {"": bool(recipe.slices), **{name: bool(module.slices) for name, module in recipe.modules.items()}}
    taken: dict[tuple[str, str], dict[int, tuple[str, int]]] = {}
    for each in met.values():
        if each.layer and cut[each.module]:
            stack, number, source = each.layer
            taken.setdefault((each.module, stack), {})[number] = (each.sources[0][0], source)
    for (module, stack), layers in taken.items():
        donor = layers[0][0]
        count = len(inside_of(kit.tensors[donor], stack))
        key = _section(made, module, stack, count)
        configs = [kit.configs[m].get(key, {}) if key else kit.configs[m] for m, _ in layers.values()]
        _resize(made[key] if key else made, configs, layers, count, stack)
    return made


def _section(config: Mapping[str, Any], module: str, stack: str, count: int) -> str:
    """Which part of a config describes a stack: by a number that is its layers', and what the two are called."""
    words = {*stack.split("."), *module.split(".")}
    seen = "vision" in module or bool(set(IMAGES) & words)
    fitting = [key for key, section in sections(config).items() if count in counts(section).values()]
    if not fitting:
        raise MismatchError(f"config.json does not say that {stack} has {count} layers", fix="mend it first")
    return max(fitting, key=lambda key: (key.removesuffix("_config") in words, ("vision" in key) == seen, bool(key)))


def _resize(
    section: dict[str, Any],
    configs: Sequence[Mapping[str, Any]],
    layers: Mapping[int, tuple[str, int]],
    count: int,
    stack: str,
) -> None:
    """Writes the number of layers; lists with an entry a layer, or with layers' numbers, follow the new order."""
    keys = [key for key, value in counts(section).items() if value == count]
    side = [key for key in keys if ("decoder" in key) == ("decoder" in stack)] or keys
    for key in side:
        section[key] = len(layers)
    for key, value in list(section.items()):
        if not isinstance(value, list):
            continue
        if len(value) == count and any(word in key for word in BY_LAYER):
            section[key] = [config.get(key, value)[number] for config, (_, number) in zip(configs, layers.values())]
        elif key.endswith("_layers") and all(isinstance(each, int) for each in value):
            section[key] = [
                new for config, (new, (_, old)) in zip(configs, layers.items()) if old in config.get(key, value)
            ]


def tied_apart(
    met: Mapping[str, Met], config: dict[str, Any], first: Mapping[str, LazyTensor], same: Callable[[str, str], bool]
) -> None:
    """What is stored beside what it would be tied to is no longer tied by the config.

    That is where an input ties it and another does not, where the first model lacks it, and where the recipe treats the
    two differently. same(a, b): whether two tensors are made of the same models in the same way.
    """
    outside = [name for name, each in met.items() if not each.layer]
    apart = any(mine != name for name in outside for _, mine in met[name].sources)
    apart = apart or any(name not in first for name in outside)
    if not apart and config.get("tie_word_embeddings"):
        tables = [name for name in outside if len(first[name].shape) == 2]
        apart = any(first[a].shape == first[b].shape and not same(a, b) for a in tables for b in tables if a < b)
    if apart and config:
        for section in [config, *(v for v in config.values() if isinstance(v, dict))]:
            if section is config or "tie_word_embeddings" in section:
                section["tie_word_embeddings"] = False


def lacking(weights: Weights) -> dict[str, str]:
    """What a config asks for and its tensors are not, by name with the first number in it left out; {} if not known."""
    try:
        layout = weights.layout()
    except LfmError:
        return {}
    stored, found = weights.tensors(), {}
    for name, shape in layout.tensors.items():
        if name in stored:
            if tuple(stored[name].shape) != shape:
                found[name] = f"{name} is {list(stored[name].shape)}, the config asks for {list(shape)}"
        elif not any(name.endswith(tied) for tied in layout.tied):
            found[name] = f"there is no {name}"
    return {NUMBER.sub("*", name, count=1): what for name, what in found.items()}


def fits(result: Weights, first: Weights) -> None:
    """MismatchError where a result of other tensors or another config than its first model lacks what that asks for."""
    ours, theirs = result.tensors(), first.tensors()
    same = ours.keys() == theirs.keys() and all(tuple(ours[n].shape) == tuple(theirs[n].shape) for n in ours)
    if same and result.config() == first.config():
        return
    wrong = lacking(result)
    before = lacking(first) if wrong else {}
    if wrong := {name: what for name, what in wrong.items() if name not in before}:
        raise MismatchError(
            "the result would not be a model that its config describes",
            why="; ".join(list(wrong.values())[:3]),
            fix="choose layers so that each stands where the config expects its kind; for tokens add tokenizer_source:",
        )


BY_LAYER = ("layer", "mlp", "attention", "sliding", "pattern", "types", "intermediate_size", "rope", "block", "hybrid")
"""Parts of the names of lists that have an entry for each layer."""

HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "num_heads")
"""What decides how rows of a matrix are read, though shapes do not show it."""
OF_NO_MATTER = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "vocab_size")


def compared(met: Mapping[str, Met], kit: Kit) -> tuple[str, ...]:
    """Settings in which the models' configs differ beside those that a merge takes care of.

    MismatchError where weights of one shape mean different things, where a config contradicts its tensors, or where the
    result would have none though a model has one.
    """
    refs = list(dict.fromkeys(ref for each in met.values() for ref, _ in each.sources))
    first = next(iter(kit.configs))
    if not kit.configs[first] and (other := next((ref for ref in refs if kit.configs[ref]), "")):
        raise MismatchError(f"{first} has no config.json", why=f"{other} has one, and the result takes {first}'s")
    for ref in refs:
        _holds(ref, kit)
    differ: dict[str, None] = {}
    for ref in refs:
        for key, section in sections(kit.configs[ref]).items():
            mine = sections(kit.configs[first]).get(key, {})
            for name in mine.keys() & section.keys():
                if mine[name] != section[name] and not isinstance(mine[name], dict):
                    if name in HEADS:
                        raise MismatchError(
                            f"{first} and {ref} do not go together",
                            why=f"their configs say {name} {mine[name]} and {section[name]}: rows mean other things",
                        )
                    if name not in (*OF_NO_MATTER, *counts(mine)) and not name.endswith(("_token_id", "_layers")):
                        differ.setdefault(f"{name} ({ref}: {section[name]})")
    return tuple(differ)


def _holds(ref: str, kit: Kit) -> None:
    """MismatchError for a model that has fewer layers than its config says: its others would be random."""
    config = kit.configs[ref]
    told = next((s[k] for s in sections(config).values() for k in ("num_hidden_layers", "n_layer") if k in s), 0)
    stacks = [depth.blocks for depth in depths(kit.tensors[ref]).values()]
    if isinstance(told, int) and 1 < max(stacks, default=0) < told:
        raise MismatchError(
            f"{ref}/config.json says {told} layers", why=f"its tensors have {max(stacks)}", fix="fetch or save it again"
        )
