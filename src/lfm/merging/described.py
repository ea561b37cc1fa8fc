"""The result's config: as many layers as the slices made, and nothing tied that is stored apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lfm.core.errors import MismatchError
from lfm.merging.layout import IMAGES, Kit, Met, counts, inside_of, sections
from lfm.merging.recipe import Recipe


def resized(recipe: Recipe, met: Mapping[str, Met], config: Mapping[str, Any], kit: Kit) -> dict[str, Any]:
    """The config with as many layers as the slices made, and its lists with one entry a layer in their order.

    MismatchError where no number in it is that of the layers.
    """
    made: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in config.items()}
    cut = {"": bool(recipe.slices), **{name: bool(module.slices) for name, module in recipe.modules.items()}}
    taken: dict[tuple[str, str], dict[int, tuple[str, int]]] = {}
    for each in met.values():
        if each.layer and cut[each.module]:
            stack, number, source = each.layer
            taken.setdefault((each.module, stack), {})[number] = (each.sources[0][0], source)
    for (module, stack), layers in taken.items():
        donor = layers[0][0]
        count = len(inside_of(kit.tensors[donor], stack))
        for key in _section(made, module, stack, count):
            section = made[key] if key else made
            _resize(
                section,
                [kit.configs[m][key] if key else kit.configs[m] for m, _ in layers.values()],
                layers,
                count,
                stack,
            )
    return made


def _section(config: Mapping[str, Any], module: str, stack: str, count: int) -> list[str]:
    """Which part of a config describes a stack: by a number that is its layers', and what the two are called."""
    fitting = [k for k, s in sections(config).items() if any(counts(n) and v == count for n, v in s.items())]
    seen = "vision" in module or set(IMAGES) & set(stack.split("."))
    liked = [k for k in fitting if ("vision" in k) == bool(seen)] or fitting
    inner = [k for k in liked if k] or liked
    if not inner:
        raise MismatchError(f"config.json does not say that {stack} has {count} layers", fix="mend it first")
    return inner[:1]


def _resize(
    section: dict[str, Any],
    configs: Sequence[Mapping[str, Any]],
    layers: Mapping[int, tuple[str, int]],
    count: int,
    stack: str,
) -> None:
    """Writes the number of layers, and puts lists of one entry a layer into their order."""
    keys = [key for key, value in section.items() if counts(key) and value == count]
    side = [key for key in keys if ("decoder" in key) == ("decoder" in stack)] or keys
    for key in side:
        section[key] = len(layers)
    for key, value in list(section.items()):
        if isinstance(value, list) and len(value) == count and key.startswith(("layer", "mlp", "attention", "sliding")):
            section[key] = [config.get(key, value)[number] for config, (_, number) in zip(configs, layers.values())]


def tied_apart(met: Mapping[str, Met], config: dict[str, Any]) -> list[str]:
    """Tensors that some inputs tie and others do not: they are stored, and the config no longer ties them."""
    apart = [name for name, each in met.items() if any(mine != name for _, mine in each.sources) and not each.layer]
    if apart:
        for section in [config, *(v for v in config.values() if isinstance(v, dict))]:
            if section is config or "tie_word_embeddings" in section:
                section["tie_word_embeddings"] = False
    return apart
