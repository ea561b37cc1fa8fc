"""Merge models as a mergekit recipe says: slices, layers and parts of models, each tensor by settings of its own.

    θ_out = m(θ₁, …, θₙ; settings of this tensor),      m the recipe's merge_method, by lfm's method of that name

Source: mergekit 0.1.5 (https://github.com/arcee-ai/mergekit), whose YAML is read unchanged: models, slices, modules,
gradients over layers, filters, base_model, dtype and out_dtype, tokenizer and chat_template. Different from it:
architectures need no definition, tensors meet by name and layer; a tensor without its counterpart is an error, where
mergekit may leave it out; tied weights are compared with untied ones, and the config then says that the result's are
not tied; arithmetic is in fp64 and rounded once, whatever `dtype` is, so that no input is rounded before it is used;
lists of the config with one entry a layer follow the slices; numbers of special tokens follow the tokenizer. Randomly
dropped entries (dare, della) are others than mergekit's, with the same probabilities; what DARE keeps is divided by the
density, not by the ratio of norms that came out. A parameter that the method does not have is noted, not an error.

Models: those that the recipe names, the base first, then in the order of their first mention. Shapes must be equal, but
for the rows of tables of tokens where the recipe asks for a tokenizer. Streamed: memory does not grow with the model.
Errors: ConfigError for a recipe that cannot be followed, MismatchError for tensors that do not meet, both before any
weight is read; CorruptError naming a tensor that holds a NaN or an infinity.

    lfm merge recipe.yml merged
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

import lfm.core
from lfm.core import Cost, Inputs, Meta, Method, Model, Run, Sizes, Slot, Weights, registry
from lfm.core.config import configure
from lfm.core.errors import ConfigError, LfmError, MismatchError
from lfm.fusing import Rule, fuse, stored
from lfm.fusing.inputs import memory
from lfm.fusing.joins import weighted
from lfm.merging import tokenizer
from lfm.merging.described import compared, fits, resized, tied_apart
from lfm.merging.layout import Kit, Met, lay_out, of_the_architecture, sections
from lfm.merging.recipe import DTYPES, Recipe, code_of, filled, parse, references
from lfm.merging.settings import check, language, resolve
from lfm.merging.vocabulary import aligned
from lfm.tensors.lazy import code_of as stored_as
from lfm.tensors.lazy import size
from lfm.tensors.match import equal
from lfm.tensors.safetensors_file import DTYPES as STORED
from lfm.tensors.safetensors_file import FLOATING

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor


class Config(lfm.core.Config, frozen=True):
    recipe: Annotated[str, Meta(description="mergekit's YAML, as text")] = ""
    values: Annotated[dict[str, float], Meta(description="numbers that stand for ${NAME} in the recipe")] = (
        msgspec.field(default_factory=dict)
    )


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    recipe, ignored = parse(filled(config.recipe, config.values))
    kit, met, tables = _laid_out(recipe, inputs)
    if ignored := (*ignored, *_unused(recipe)):
        run.note(ignored=", ".join(ignored))
    if kit.left_out:
        run.note(left_out=", ".join(kit.left_out))
    if differ := compared(met, kit):
        run.note(configs_differ="; ".join(differ))
    models = dict(zip(references(recipe), inputs.all("models"), strict=True))
    first = next(iter(models))
    described = _described(recipe, met, kit)
    sources = {name: [kit.tensors[ref][n] for ref, n in each.sources] for name, each in met.items()}
    scratch = run.work / "scratch"
    beside = {ref: model.ask(Weights).files() for ref, model in models.items()}
    files: Mapping[str, Any] = beside[first]
    if wanted := recipe.wants_tokenizer:
        vocabulary, made = tokenizer.made(wanted, first, beside, _lengths(kit, met, tables), scratch / "tokenizer")
        for name in tables:
            own = dict(zip((ref for ref, _ in met[name].sources), sources[name]))
            sources[name] = list(aligned(vocabulary, own).values())
        _resize_vocabulary(described, kit.tensors[first][tables[0]].shape[0], vocabulary.rows)
        if wanted.source not in ("base", "union"):
            tokenizer.with_ids(described, kit.configs[wanted.source])
            files = beside[wanted.source]
        files = tokenizer.gathered({**tokenizer.others(files), **made}, scratch / "files")
    if recipe.chat_template:
        files = tokenizer.with_template(files, tokenizer.template(recipe.chat_template, beside), scratch / "files")
    tensors = _merged(recipe, met, sources, run)
    code = code_of(recipe.out_dtype or recipe.dtype)
    if code:
        tensors = {name: stored(tensor, code) for name, tensor in tensors.items()}
    if code and described:
        described |= dict.fromkeys(
            {"dtype", *({"torch_dtype"} & described.keys())}, next(n for n, c in DTYPES.items() if c == code)
        )
    weights = models[first].ask(Weights)
    result = weights.assemble({name: tensors[name] for name in met}, described, files)
    if tables:
        fits(result.ask(Weights), weights)
    return result


def _described(recipe: Recipe, met: Mapping[str, Met], kit: Kit) -> dict[str, Any]:
    """The result's config, but for its dtype and vocabulary."""
    first = next(iter(kit.configs))
    config = resized(recipe, met, kit.configs[first], kit)

    def same(a: str, b: str) -> bool:
        models = [[ref for ref, _ in met[name].sources] for name in (a, b)]
        return models[0] == models[1] and resolve(recipe.merge_method, met[a].place) == resolve(
            recipe.merge_method, met[b].place
        )

    tied_apart(met, config, kit.tensors[first], same)
    return config


def _laid_out(recipe: Recipe, inputs: Inputs) -> tuple[Kit, dict[str, Met], list[str]]:
    """The inputs, every tensor of the result, and which of them have a row for each token that is to be moved."""
    models = dict(zip(references(recipe), inputs.all("models"), strict=True))
    weights = {ref: model.ask(Weights) for ref, model in models.items()}
    kit = Kit(
        {ref: w.tensors() for ref, w in weights.items()},
        {ref: w.config() for ref, w in weights.items()},
        cache(lambda ref: weights[ref].layout()),
    )
    kit = of_the_architecture(kit)
    met = lay_out(recipe, language(recipe.merge_method), kit)
    tables = by_token(met, kit, next(iter(models))) if recipe.wants_tokenizer else []
    for name, each in met.items():
        _meet(name, each, kit, moved=name in tables)
    return kit, met, tables


def _meet(name: str, met: Met, kit: Kit, *, moved: bool) -> None:
    """MismatchError unless the shapes that meet in a tensor are equal, but for the rows where those are moved."""
    given = [(ref, n, kit.tensors[ref][n]) for ref, n in met.sources]
    ref, mine, first = given[0]
    for other, theirs, tensor in given[1:]:
        a, b = list(first.shape), list(tensor.shape)
        if (a[1:], len(a)) != (b[1:], len(b)) or (a != b and not moved):
            table = len(a) == len(b) and a[1:] == b[1:] and not met.layer
            raise MismatchError(
                f"{mine!r} of {ref} and {theirs!r} of {other} do not meet in {name!r}",
                why=f"their shapes are {a} and {b}",
                fix="where vocabularies differ, add tokenizer_source: union (or base)" if table else "",
            )
        if (stored_as(first) in FLOATING) != (stored_as(tensor) in FLOATING):
            raise MismatchError(f"{mine!r} is floating in one of {ref} and {other}, and integer in the other")


def _merged(
    recipe: Recipe, met: Mapping[str, Met], sources: Mapping[str, Sequence[LazyTensor]], run: Run
) -> dict[str, LazyTensor]:
    """Each tensor by the recipe's method, those of as many inputs at a time."""
    method = registry.get(f"reuse.{recipe.merge_method}").method
    assert method.merge is not None
    configs = cache(lambda name: _config(recipe, method, met[name]))
    made: dict[str, LazyTensor] = {}
    groups: dict[tuple[int, bool], list[str]] = {}
    for name, given in sources.items():
        if stored_as(given[0]) in FLOATING:
            groups.setdefault((len(given), met[name].place.base is not None), []).append(name)
        elif not all(equal(given[0], other) for other in given[1:]):
            raise MismatchError(f"{name!r} holds integers, which are not the same in all models")
        else:
            made[name] = given[0]
    for (count, based), names in groups.items():
        base = {name: sources[name][met[name].place.base or 0] for name in names} if based else None
        rest: list[dict[str, LazyTensor]] = [{} for _ in range(count - based)]
        for name in names:
            tuned = [each for i, each in enumerate(sources[name]) if i != met[name].place.base]
            for model, tensor in zip(rest, tuned, strict=True):
                model[name] = tensor
        if base is not None and language(recipe.merge_method).base == "first":
            base, rest = None, [base, *rest]
        if not rest:
            made |= fuse(Rule(weighted, given=lambda name: {"weight": (1.0,)}), names, [base or {}])
        else:
            made |= method.merge(names, base, rest, configs, run)
    return made


def _config(recipe: Recipe, method: Method[Any], met: Met) -> Any:
    """The method's settings for a tensor."""
    told = resolve(recipe.merge_method, met.place)
    return _configured(recipe.merge_method, method.config, tuple(sorted(told.items())))


@cache
def _configured(name: str, config: type[Any], settings: tuple[tuple[str, Any], ...]) -> Any:
    """Most tensors have the same. A density of 0, which no method offers, drops all there is."""
    told = dict(settings)
    density = told.get("density")
    if density is None:
        return configure(config, told, where=name)
    many = isinstance(density, tuple)
    kept = [min(d, 1.0) if d > 0 else 0.0 for d in (density if many else (density,))]
    given = {**told, "density": [d or 1.0 for d in kept] if many else kept[0] or 1.0}
    return msgspec.structs.replace(configure(config, given, where=name), density=tuple(kept) if many else kept[0])


def by_token(met: Mapping[str, Met], kit: Kit, ref: str) -> list[str]:
    """Tensors with a row for each token: those that the architecture declares; of one not known, by their shapes."""
    try:
        declared = kit.layout(ref).by_token
    except LfmError:
        declared = frozenset()
    found = [name for name in met if name in declared]
    if not found:
        sizes = {
            ref: next((s["vocab_size"] for s in sections(c).values() if "vocab_size" in s), 0)
            for ref, c in kit.configs.items()
        }
        found = [
            n
            for n, m in met.items()
            if not m.layer and all(kit.tensors[r][o].shape[:1] == (sizes[r],) for r, o in m.sources)
        ]
    if not found:
        raise MismatchError(
            "no tensor has a row for each token", why="a tokenizer is asked for, whose rows are to be moved"
        )
    return found


def _lengths(kit: Kit, met: Mapping[str, Met], tables: Sequence[str]) -> dict[str, int]:
    """How many rows each model's table of tokens has."""
    found = {}
    for ref, tensors in kit.tensors.items():
        names = [n for table in tables for r, n in met[table].sources if r == ref] + [n for n in tables if n in tensors]
        if not names:
            raise MismatchError(f"{ref} has no table of tokens", why=f"the others have {tables[0]}")
        found[ref] = tensors[names[0]].shape[0]
    return found


def _resize_vocabulary(config: dict[str, Any], before: int, rows: int) -> None:
    for place, section in {"": config, **{k: v for k, v in config.items() if isinstance(v, dict)}}.items():
        if "vocab_size" in section and (place in ("", "text_config") or section["vocab_size"] == before):
            section["vocab_size"] = rows


def _unused(recipe: Recipe) -> list[str]:
    """Parameters that have no effect where they stand. ConfigError for one that no method has."""
    slices = [*recipe.slices, *(part for module in recipe.modules.values() for part in module.slices)]
    sources = [*recipe.models, *(s for part in slices for s in part.sources)]
    sources += [s for module in recipe.modules.values() for s in module.models]
    wide = [("the recipe", recipe.parameters), *(("a slice", part.parameters) for part in slices)]
    wide += [(f"module {name}", module.parameters) for name, module in recipe.modules.items()]
    found = [name for where, given in wide for name in check(recipe.merge_method, given, where)]
    found += [n for s in sources for n in check(recipe.merge_method, s.parameters, s.model, of_model=True)]
    found += ["residual_weight"] * any(part.residual_weight is not None for part in slices)
    return list(dict.fromkeys(found))


def agree(config: Config, inputs: Inputs) -> None:
    """The recipe is read, every tensor laid out, and its settings resolved: nothing that it says can fail later."""
    recipe, _ = parse(filled(config.recipe, config.values))
    wanted = references(recipe)
    if len(wanted) != len(inputs.all("models")):
        raise ConfigError(
            f"the recipe names {len(wanted)} models, {len(inputs.all('models'))} were given",
            why=f"they are {', '.join(wanted)}",
            fix="`lfm merge RECIPE OUT` gives the ones it names",
        )
    _unused(recipe)
    kit, met, tables = _laid_out(recipe, inputs)
    compared(met, kit)
    if not tables:
        weights = inputs.all("models")[0].ask(Weights)
        sketch = {name: kit.tensors[ref][n] for name, each in met.items() for ref, n in each.sources[:1]}
        fits(weights.assemble(sketch, _described(recipe, met, kit), {}).ask(Weights), weights)
    method = registry.get(f"reuse.{recipe.merge_method}").method
    for each in met.values():
        _config(recipe, method, each)


def cost(config: Config, sizes: Sizes) -> Cost:
    models = sizes.models["models"]
    flops = 20.0 * sum(facts.parameters for facts in models)
    recipe = parse(filled(config.recipe, config.values))[0] if config.recipe else None
    light = recipe is not None and not recipe.wants_tokenizer and not recipe.chat_template
    return Cost(flops=flops, memory=memory(sizes), disk=max(facts.bytes for facts in models), light=light)


def disk(config: Config, inputs: Inputs) -> int:
    """Bytes of every tensor of the result. Of tables that are brought to one vocabulary: were no token shared."""
    recipe, _ = parse(filled(config.recipe, config.values))
    kit, met, tables = _laid_out(recipe, inputs)
    code, total = code_of(recipe.out_dtype or recipe.dtype), 0
    for name, each in met.items():
        given = [kit.tensors[ref][n] for ref, n in each.sources]
        like = given[each.place.base or 0]
        numbers = sum(map(size, given)) if name in tables else size(like)
        total += numbers * STORED[code if code and stored_as(like) in FLOATING else stored_as(like)][1]
    return total


def origin(config: Config, inputs: Inputs) -> dict[str, LazyTensor]:
    """The base's tensor that each tensor of the result began as, where the recipe has a base."""
    recipe, _ = parse(filled(config.recipe, config.values))
    kit, met, _ = _laid_out(recipe, inputs)
    begun = {name: each.sources[each.place.base] for name, each in met.items() if each.place.base is not None}
    return {name: kit.tensors[ref][n] for name, (ref, n) in begun.items()}


METHOD = Method(
    paper="mergekit",
    config=Config,
    models={"models": Slot((Weights,), max=None, help="the models that the recipe names, in its order")},
    run=run,
    cost=cost,
    agree=agree,
    disk=disk,
    origin=origin,
)
