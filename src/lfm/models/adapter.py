"""Adapter: a PEFT directory over a base that is found by its recorded path or by its digest."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final

from lfm.core.errors import CorruptError, MismatchError, ModelError
from lfm.core.heavy import nn, peft, torch
from lfm.core.interfaces import Adaptation, Codec, Features, Gradients, LazyTensor, LowRank, Weights
from lfm.core.model import Model
from lfm.models import checkpoint, local, lora, virtual
from lfm.models.quiet import quiet

if TYPE_CHECKING:
    from peft.config import PeftConfig
    from torch import Tensor

CONFIG = "adapter_config.json"
STEM = "adapter_model"
TENSORS = f"{STEM}.safetensors"
BASE = "base.json"
"""Beside PEFT's own files: the digest of the base, so that a moved or changed base is found or refused."""

VOLATILE = ("base_model_name_or_path", "inference_mode", "peft_version", "revision", "auto_mapping", "task_type")
TASK_TYPES = {"causal-lm": "CAUSAL_LM", "seq2seq-lm": "SEQ_2_SEQ_LM"}
"""By which peft's auto classes find the base's class. Those of classifiers would add a head of their own."""


class Stored(Protocol):
    """An adapter as it is stored: its settings, its tensors and the base it is over."""

    @property
    def base(self) -> Model: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def tensors(self) -> Callable[[], Mapping[str, Any]]: ...


@final
@dataclass(frozen=True)
class Source:
    ref: str
    base: Model
    config: Mapping[str, Any]
    tensors: Callable[[], Mapping[str, Any]]
    base_digest: str = ""  # as recorded; empty where none was
    base_ref: str = ""


def open_adapter(directory: Path, find_base: Callable[[str, str], Model]) -> Model:
    """The adapter in a directory. find_base(path, digest) opens the base."""
    return model_of(source_of(directory, find_base))


def source_of(directory: Path, find_base: Callable[[str, str], Model]) -> Source:
    """What an adapter's directory says; its tensors are read when they are asked for."""
    from lfm.tensors.files import open_tensors

    config = _json(directory / CONFIG)
    recorded = _json(directory / BASE) if (directory / BASE).exists() else {}
    if not (directory / TENSORS).exists() and any(directory.glob("adapter_model.*")):
        open_tensors(next(directory.glob("adapter_model.*")))  # refuses a pickled file, saying how to convert it
    where = str(config.get("base_model_name_or_path") or recorded.get("ref") or "")
    if where and not Path(where).is_absolute() and (directory / where).exists():
        where = str((directory / where).resolve())
    base = find_base(where, str(recorded.get("digest", "")))
    tensors = partial(open_tensors, directory / TENSORS)
    return Source(str(directory), base, config, tensors, str(recorded.get("digest", "")), where)


def over(base: Model, module: nn.Module, *, ref: str = "adapter") -> Model:
    """The adapter that a trained peft module holds, over the base it was made from."""
    return of_settings(base, *settings_of(module), ref=ref)


def settings_of(module: nn.Module) -> tuple[PeftConfig, dict[str, Tensor]]:
    """A peft module's config, and its adapter's tensors by the names that they are stored under."""
    adapted: Any = module
    # save_embedding_layers="auto" would ask the Hub for the base's config
    trained = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    state = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in trained.items()}
    return adapted.peft_config["default"], state


def of_settings(base: Model, settings: PeftConfig, state: Mapping[str, Tensor], *, ref: str = "adapter") -> Model:
    """The adapter of these settings and tensors, over the base."""
    config = plain(settings.to_dict())
    config["base_model_name_or_path"] = _named(base)
    config["inference_mode"] = True
    config["task_type"] = config.get("task_type") or TASK_TYPES.get(base.facts.task)
    return model_of(Source(f"{ref} over {base.ref}", base, config, lambda: state, ""))


def of_changes(base: Model, changes: Mapping[str, LowRank], whole: Mapping[str, LazyTensor | Tensor]) -> Model:
    """The LoRA adapter that makes these changes to the base; α = r, so that W + BA is what it makes."""
    weights = base.ask(Weights)
    named = lora.unstored(weights) if whole else str
    stored = {named(name): tensor for name, tensor in weights.tensors().items()}
    config, tensors = lora.settings(changes, whole, stored)
    config |= {"base_model_name_or_path": _named(base), "task_type": TASK_TYPES.get(base.facts.task)}
    return model_of(Source(f"an adapter over {base.ref}", base, config, lambda: tensors))


def _named(base: Model) -> str | None:
    """The base for peft's auto classes; None for an adapter, which they would put this one in the place of unsaid."""
    return None if base.kind == "adapter" else base.ref


def model_of(source: Source) -> Model:
    """What the base gives, as the adapter changes it; weights where the adapter can be merged."""
    base = source.base
    gives: dict[type, Callable[[], Any]] = {Stored: lambda: source}
    mergeable = source.config.get("peft_type") in MERGEABLE
    formats: dict[str, Callable[[Path], Any]] = {"adapter": partial(write, source)}
    if mergeable:
        formats["checkpoint"] = lambda out: _merged(source).save(out, "checkpoint")
    hint, instead = lora.inexpressible(source.config), ""
    if not hint:
        gives[Adaptation] = lambda: lora.StoredAdaptation(source)
    if Gradients in base.gives:
        codec = (lambda: base.ask(Codec)) if Codec in base.gives else None
        inside = set(base.gives)
        made = local.interfaces(base.facts.task or "module", partial(open_module, source), codec)
        gives |= {kind: opener for kind, opener in made.items() if kind in inside or Gradients in inside}
        if codec:
            gives[Codec] = codec
        if source.config.get("peft_type") in virtual.IN_ROWS:
            gives.pop(Features, None)  # the prompt's own places would be among them
        if mergeable:
            gives[Gradients] = lambda: MergedGradients(source)
        else:
            kind = source.config.get("peft_type")
            hint = f"it is a {kind} adapter, which cannot be merged into its base and is used beside it as it is"
            instead = f"{base.ref}, its base, or an adapter that can be merged (tune.lora, tune.svf, tune.bitfit)"
    else:
        hint = f"its base {base.ref} gives no gradients"
    if Weights in base.gives and (Gradients in gives or Adaptation in gives):
        gives[Weights] = lambda: _merged(source).ask(Weights)
    return Model(
        ref=source.ref,
        kind="adapter",
        gives=gives,
        identify=partial(digest, source),
        formats=formats,
        look=lambda: virtual.shortened(base.facts, virtual.tokens(source.config)),
        hint=hint,
        instead=instead,
    )


MERGEABLE = (
    *("LORA", "IA3", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "HRA", "FOURIERFT", "LN_TUNING"),
    *("SVF", "BITFIT"),
)


def checked(source: Source) -> Model:
    """The base. MismatchError where it is not the one that the adapter was made for."""
    if source.base_digest and source.base.digest != source.base_digest:
        raise MismatchError(
            f"the base of {source.ref} is not the one it was made for",
            why=f"{source.base.ref} has digest {source.base.digest[:12]}, recorded was {source.base_digest[:12]}",
            fix=f"it was made over {source.base_ref or 'a model'} with digest {source.base_digest[:12]}: give it that",
        )
    return source.base


def open_peft(source: Source) -> Any:
    """A fresh PeftModel over a fresh copy of the base. MismatchError where adapter and base do not fit."""
    base = checked(source)
    kind = source.config.get("peft_type", "")
    mapping = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    if kind not in mapping:
        raise ModelError(f"{source.ref} is of an unknown adapter type {kind!r}", fix=f"peft has {', '.join(mapping)}")
    known = inspect.signature(mapping[kind].__init__).parameters
    # peft adds to lists that it is given
    config = mapping[kind](**{key: copy.deepcopy(value) for key, value in source.config.items() if key in known})
    module = base.ask(Gradients).module()
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            adapted: Any = peft.get_peft_model(module, config)  # type: ignore[arg-type]
    except (ValueError, NotImplementedError, TypeError) as error:  # none of its layers there, or of another kind
        raise MismatchError(
            f"{source.ref} does not fit {base.ref}",
            why=str(error).splitlines()[0],
            fix="give the adapter the base it was made for, or one of that architecture",
        ) from None
    state = {name: t if isinstance(t, torch.Tensor) else t.read() for name, t in source.tensors().items()}
    try:
        result = peft.set_peft_model_state_dict(adapted, state)
    except (RuntimeError, KeyError, ValueError) as error:
        raise MismatchError(f"{source.ref} does not fit {base.ref}", why=str(error).splitlines()[0]) from None
    # a prompt's rows have gone where they belong, and are told of all the same
    unplaced = [name for name in result.unexpected_keys if name != "prompt_embeddings" or not virtual.room(adapted)]
    if unplaced:
        raise MismatchError(f"{source.ref} does not fit {base.ref}", why=f"no place for {', '.join(unplaced[:3])}")
    return virtual.answering(adapted).eval()


def open_module(source: Source) -> nn.Module:
    """The adapted module: merged in fp32 where that is exact in form, else with the adapter beside it."""
    adapted = open_peft(source)
    if source.config.get("peft_type") not in MERGEABLE or _divides_tied(adapted):
        return adapted
    with quiet():
        _unwrap_saved(adapted.get_base_model())  # peft's merging takes the head for one layer with a weight
        return adapted.merge_and_unload().eval()


def _unwrap_saved(module: nn.Module) -> None:
    """What was trained whole beside the adapter, put where the wrappers around it and what was there before are."""
    for name, child in [*module.named_modules()]:
        if isinstance(child, peft.utils.ModulesToSaveWrapper):
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, child.modules_to_save[child.active_adapters[0]])


def _divides_tied(adapted: Any) -> bool:
    """Whether a layer is adapted whose weight another shares: merged, the change would reach both of them."""
    module = adapted.get_base_model()
    tied = getattr(module, "all_tied_weights_keys", None) or {}
    owners = {name.rpartition(".")[0] for pair in tied.items() for name in pair}
    return any(
        name in owners and (hasattr(layer, "base_layer") or hasattr(layer, "modules_to_save"))
        for name, layer in module.named_modules()
    )


@final
class MergedGradients:
    """The merged module, to train further."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def module(self) -> nn.Module:
        module = open_module(self._source)
        if hasattr(module, "peft_config"):
            raise MismatchError(
                f"{self._source.ref} cannot be merged into its base",
                why="it adapts one of two layers whose weights the base ties",
                fix="keep it as an adapter: served beside the base it means what it was trained to",
            )
        return module.requires_grad_(True)

    def skeleton(self) -> nn.Module:
        return self._source.base.ask(Gradients).skeleton()

    def rewrap(self, module: nn.Module) -> Model:
        return self._source.base.ask(Gradients).rewrap(module)


def _merged(source: Source) -> Model:
    """The base's checkpoint with the adapter's change in its weights, in the base's storage dtype.

    A LoRA's is computed tensor by tensor as it is read; others' take a merged module.
    """
    if Weights in source.base.gives and not lora.inexpressible(source.config):
        adaptation = lora.StoredAdaptation(source)
        base, changes, whole = adaptation.base, adaptation.changes(), adaptation.whole()
        if lora.placed(base, changes, whole) or Gradients not in base.gives:
            merged = base.ask(Weights).replace(lora.patched(base, changes, whole, source.ref))
            return merged if whole else checkpoint.as_change(merged, base, changes)
        lora.fitting(base, changes, source.ref)
    return source.base.ask(Gradients).rewrap(MergedGradients(source).module())


def digest(source: Source) -> str:
    """sha256 over the base's digest, the adapter's tensors and the settings that shape it."""
    from lfm.tensors.digest import digest_tensors

    meaning = {k: v for k, v in source.config.items() if k not in VOLATILE and v not in (None, False, [], {})}
    whole = {
        "base": source.base_digest or source.base.digest,
        "config": meaning,
        "tensors": digest_tensors(source.tensors()),
    }
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


def write(source: Source, out: Path) -> None:
    """A plain PEFT directory, and the base's digest beside it."""
    from lfm.tensors.write import write_tensors

    write_tensors(out, source.tensors(), stem=STEM)
    (out / CONFIG).write_text(json.dumps(dict(source.config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    recorded = {"digest": source.base_digest or source.base.digest, "ref": source.base.ref}
    (out / BASE).write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")


def write_low_rank(base: str, base_digest: str, task: str, changes: Mapping[str, LowRank], out: Path) -> None:
    """Changes of low rank as a PEFT LoRA adapter with α = r, so that its scale is 1 and W + BA is what it makes."""
    from lfm.tensors.write import write_tensors

    config, tensors = lora.settings(changes, {}, {})
    config |= {"base_model_name_or_path": base, "task_type": TASK_TYPES.get(task)}
    write_tensors(out, tensors, stem=STEM)
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (out / BASE).write_text(json.dumps({"digest": base_digest, "ref": base}, indent=2) + "\n", encoding="utf-8")


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A peft config's values as JSON has them."""
    return {key: _plain(value) for key, value in settings.items()}


def _plain(value: Any) -> Any:
    """JSON's nearest to a config value: sets sorted, enums by value."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return getattr(value, "value", value)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path} is not JSON", why=str(error)) from None
    if not isinstance(value, dict):
        raise CorruptError(f"{path} is not a JSON object")
    return value
