"""Checkpoint: a Hugging Face directory, or one that would be if it were saved. Nothing is read until asked."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from lfm.core.errors import CorruptError, MismatchError, ModelError
from lfm.core.heavy import torch, transformers
from lfm.core.interfaces import Codec, Gradients, Layout, LazyTensor, LowRank, Weights
from lfm.core.model import Model
from lfm.models import local
from lfm.models.codec import has_codec, open_codec
from lfm.models.told import CONFIG as CONFIG
from lfm.models.told import facts as facts
from lfm.models.told import layout as layout
from lfm.models.told import on_meta as on_meta
from lfm.models.told import task_of as task_of

if TYPE_CHECKING:
    from torch import Tensor, nn

VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures_version")
"""Keys of config.json that do not change what the model computes; left out of its digest."""
PASSED_ON = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*processor_config.json",
    "generation_config.json",
    "*.model",
    "*.jinja",
)
"""Names of the small files beside the weights (tokenizer, processor, chat template) that go on with the model."""


@final
@dataclass(frozen=True)
class Source:
    """All that a checkpoint is: its config, its tensors by stored name, and the small files that travel with it."""

    ref: str
    config: Mapping[str, Any]
    tensors: Callable[[], Mapping[str, LazyTensor | Tensor]]
    files: Mapping[str, Path]
    build: Callable[[], nn.Module] | None = None  # a bare state dict's module, given in Python
    restore: Mapping[str, LazyTensor] | None = None
    low_rank: Mapping[str, LowRank] | None = None
    over: Source | None = None  # what the changes of low rank are of
    written: str = ""  # config.json as it was read: unchanged, it is written back byte for byte

    @cached_property
    def stored(self) -> Mapping[str, LazyTensor | Tensor]:
        return self.tensors()

    @property
    def task(self) -> str:
        return task_of(self.config) if self.build is None else ""

    @property
    def known(self) -> bool:
        return self.build is not None or _described_by_file(self.config) or _architecture(self.config) is not None


def open_checkpoint(directory: Path) -> Model:
    """The checkpoint in a directory; of an architecture that transformers lacks it gives weights alone."""
    from lfm.tensors.files import open_tensors

    path = directory / CONFIG
    try:
        written = path.read_text(encoding="utf-8")
        config = json.loads(written)
        assert isinstance(config, dict)
    except (json.JSONDecodeError, UnicodeDecodeError, AssertionError) as error:
        raise CorruptError(f"{path} is not a JSON object", why=str(error)) from None
    files = {
        file.name: file
        for file in sorted(directory.iterdir())
        if file.is_file() and any(file.match(pattern) for pattern in PASSED_ON)
    }
    return model_of(Source(str(directory), config, partial(open_tensors, directory), files, written=written))


def open_bare(file: Path, build: Callable[[], nn.Module] | None = None) -> Model:
    """A safetensors state dict; with a function that builds its module it gives gradients and logits too."""
    from lfm.tensors.files import open_tensors

    return model_of(Source(str(file), {}, partial(open_tensors, file), {}, build))


def model_of(source: Source) -> Model:
    """The model that a source is."""
    with_codec = has_codec(set(source.files))
    gives: dict[type, Callable[[], Any]] = {Weights: lambda: StoredWeights(source)}
    if source.known:
        codec = _once(lambda: open_codec(_home(source), source.task))
        gives |= local.interfaces(source.task or "module", partial(open_module, source), codec if with_codec else None)
        gives[Gradients] = lambda: StoredGradients(source)
        if with_codec:
            gives[Codec] = codec
    formats = {"checkpoint": partial(write, source)}
    if source.low_rank:
        formats["adapter"] = partial(_write_adapter, source)
    return Model(
        ref=source.ref,
        kind="checkpoint",
        gives=gives,
        identify=partial(digest, source),
        formats=formats,
        look=partial(facts, source),
        hint=_hint(source),
        restore=source.restore or {},
    )


def _architecture(config: Mapping[str, Any]) -> type[Any] | None:
    """transformers' class of that name; None if it has none or the name is of another kind of thing."""
    from lfm.models.quiet import quiet

    name = next(iter(config.get("architectures") or ()), "")
    if not name or not name.isidentifier() or config.get("model_type") is None:
        return None
    with quiet():
        found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _described_by_file(config: Mapping[str, Any]) -> bool:
    """Whether transformers' file for this model type defines the class: true or not known, and nothing is imported.

    Importing transformers takes seconds, which whoever only streams weights would wait for in vain.
    """
    name = next(iter(config.get("architectures") or ()), "")
    return _defined(str(name), str(config.get("model_type") or ""))


@cache
def _defined(name: str, kind: str) -> bool:
    place = kind.replace("-", "_")
    if not name.isidentifier() or not place.isidentifier():
        return False
    package = importlib.util.find_spec("transformers")
    if package is None or package.origin is None:
        return False
    file = Path(package.origin).parent / "models" / place / f"modeling_{place}.py"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(rf"^class {name}\([^)]*PreTrainedModel\b", text, re.MULTILINE) is not None


def open_module(source: Source) -> nn.Module:
    """A fresh fp32 module on the CPU, in eval mode. MismatchError if weights and architecture do not fit together."""
    from lfm.models.quiet import quiet

    if source.build is not None:
        module = source.build()
        state = _state(source)
        result = module.load_state_dict(state, strict=False)
        missing = [n for n in result.missing_keys if not n.endswith("num_batches_tracked")]
        if missing or result.unexpected_keys:
            raise MismatchError(
                f"{source.ref} does not fit the module given for it",
                why=f"missing: {', '.join(missing[:3]) or 'none'}; "
                f"unknown: {', '.join(result.unexpected_keys[:3]) or 'none'}",
            )
        return module.float().eval()
    architecture = _architecture(source.config)
    assert architecture is not None
    state = _state(source)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            config = transformers.AutoConfig.for_model(**source.config)
            module, report = architecture.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # it then names them
            )
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise MismatchError(f"{source.ref} cannot be opened as {architecture.__name__}", why=lines[0]) from None
    if report["missing_keys"] or report["mismatched_keys"] or report["unexpected_keys"]:
        some = {kind: sorted(map(_named, report[kind]))[:3] for kind in report if report[kind]}
        raise MismatchError(
            f"the weights of {source.ref} do not fit {architecture.__name__}",
            why="; ".join(f"{kind.replace('_keys', '')}: {', '.join(names)}" for kind, names in some.items()),
            fix="check that config.json and the weights belong together",
        )
    return module.eval()


def _state(source: Source) -> dict[str, Tensor]:
    """Every tensor, read. CorruptError naming one that holds a NaN or an infinity."""
    from lfm.tensors.lazy import finite

    state = {name: _read(tensor) for name, tensor in source.stored.items()}
    for name, tensor in state.items():
        if not finite(tensor):
            raise CorruptError(
                f"{source.ref}: {name!r} holds a NaN or an infinity",
                why="whatever such a model computes is spoiled",
                fix="use a checkpoint from before its training went wrong, or fetch the file again",
            )
    return state


def _skeleton(source: Source) -> nn.Module:
    """The architecture's module; on the meta device nothing is allocated for its weights."""
    if source.build is not None:
        return source.build()
    architecture = _architecture(source.config)
    if architecture is None:
        raise ModelError(f"the layers of {source.ref} are not known", why=_hint(source) or "it is a bare state dict")
    return architecture(transformers.AutoConfig.for_model(**source.config))


def _named(key: Any) -> str:
    """A key of transformers' loading report; where sizes differ it comes with both."""
    if not isinstance(key, tuple):
        return str(key)
    name, stored, expected = key
    return f"{name} {list(stored)}, where config.json asks for {list(expected)}"


@final
class StoredWeights:
    """The tensors as stored."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def tensors(self) -> Mapping[str, LazyTensor]:
        return {name: _lazy(tensor) for name, tensor in self._source.stored.items()}

    def replace(self, tensors: Mapping[str, LazyTensor | Tensor]) -> Model:
        from lfm.tensors.lazy import cast, code_of

        before = self.tensors()
        for name, tensor in tensors.items():
            if name not in before:
                raise MismatchError(f"{self._source.ref} has no tensor {name!r}")
            if tuple(tensor.shape) != tuple(before[name].shape):
                raise MismatchError(f"{name} is {tuple(before[name].shape)}, not {tuple(tensor.shape)}")
        after = dict(before)
        for name, tensor in tensors.items():
            same = code_of(tensor) == code_of(before[name])
            after[name] = _lazy(tensor) if same else cast(_lazy(tensor), before[name].dtype)
        restore = {name: before[name] for name in tensors}
        return model_of(replace(self._source, tensors=lambda: after, restore=restore, low_rank=None, over=None))

    def config(self) -> Mapping[str, Any]:
        return self._source.config

    def files(self) -> Mapping[str, Path]:
        return self._source.files

    def assemble(
        self, tensors: Mapping[str, LazyTensor | Tensor], config: Mapping[str, Any], files: Mapping[str, Path]
    ) -> Model:
        made = {name: _lazy(tensor) for name, tensor in tensors.items()}
        written = self._source.written if config == self._source.config else ""
        return model_of(Source(self._source.ref, dict(config), lambda: made, dict(files), written=written))

    def update(self, changes: Mapping[str, LowRank]) -> Model:
        from lfm.tensors.lowrank import joined

        now = self.tensors()
        first = self._source.over or self._source
        stored, all = StoredWeights(first).tensors(), dict(self._source.low_rank or {})
        changed: dict[str, Tensor] = {}
        for name, change in changes.items():
            weight = f"{name}.weight"
            if weight not in now:
                raise MismatchError(f"{self._source.ref} has no tensor {weight!r}")
            all[name] = joined([all[name], change], (1.0, 1.0)) if name in all else change
            delta = all[name].b.double() @ all[name].a.double()
            delta = delta.T if change.transposed else delta
            changed[weight] = (stored[weight].read().double() + delta).to(now[weight].dtype)
        return as_change(self.replace(changed), first, all)

    def layout(self) -> Layout:
        return layout(partial(_skeleton, self._source))

    def adapt(self, changes: Mapping[str, LowRank], whole: Mapping[str, LazyTensor | Tensor] | None = None) -> Model:
        from lfm.models.adapter import of_changes

        return of_changes(model_of(self._source), changes, whole or {})


def as_change(made: Model, over: Model | Source, changes: Mapping[str, LowRank]) -> Model:
    """The model as a checkpoint and changes of low rank, which can be saved as an adapter; itself if it is not one."""
    weights = made.ask(Weights)
    first = over if isinstance(over, Source) else over.ask(Weights)
    source = first if isinstance(first, Source) else getattr(first, "_source", None)
    if not isinstance(weights, StoredWeights) or not isinstance(source, Source):
        return made
    return model_of(replace(weights._source, low_rank=dict(changes), over=source))


@final
class StoredGradients:
    """The module, to train."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def module(self) -> nn.Module:
        module = open_module(self._source)
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        return module

    def skeleton(self) -> nn.Module:
        return on_meta(partial(_skeleton, self._source))

    def rewrap(self, module: nn.Module) -> Model:
        state = state_of(module)
        stored = self._source.stored
        floating = [t.dtype for t in stored.values() if t.dtype.is_floating_point]
        usual = max(set(floating), key=floating.count) if floating else torch.float32
        tensors = {
            name: tensor.to(stored[name].dtype if name in stored else usual) if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
        }
        config = dict(self._source.config)
        described: Any = getattr(module, "config", None)
        if described is not None:
            now = _described(described)
            then = _described(transformers.AutoConfig.for_model(**config))
            config |= {key: value for key, value in now.items() if key not in VOLATILE and then.get(key) != value}
            config["architectures"] = [type(module).__name__]
        restore = {name: _lazy(tensor) for name, tensor in stored.items()}
        after = replace(self._source, config=config, tensors=lambda: tensors, restore=restore)
        return model_of(replace(after, low_rank=None, over=None))


def _described(config: Any) -> dict[str, Any]:
    return json.loads(config.to_json_string(use_diff=False))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors under the names a checkpoint stores them by; tied ones once. Copies, on the CPU."""
    state = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in module.state_dict().items()}
    for name in getattr(module, "all_tied_weights_keys", None) or {}:
        state.pop(name, None)
    if hasattr(module, "save_pretrained"):
        from transformers.core_model_loading import revert_weight_conversion

        state = revert_weight_conversion(module, state)  # type: ignore[arg-type]
    return state


def digest(source: Source) -> str:
    """sha256 over the config's meaning, the tensors' bytes and the tokenizer's or processor's files."""
    from lfm.tensors.digest import digest_tensors

    meaning = {key: value for key, value in source.config.items() if key not in VOLATILE}
    files = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in source.files.items()
        if name != "generation_config.json"
    }
    whole = {"config": meaning, "tensors": digest_tensors(source.stored), "files": files}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def write(source: Source, out: Path) -> None:
    """A directory that plain transformers loads: config, weights (sharded past 5 GB) and the small files, unchanged."""
    from lfm.tensors.write import write_tensors

    write_tensors(out, source.stored)
    if source.config:
        text = json.dumps(source.config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        unchanged = source.written and json.loads(source.written) == source.config
        (out / CONFIG).write_text(source.written if unchanged else text, encoding="utf-8")
    for name, path in source.files.items():
        shutil.copyfile(path, out / name)


def _write_adapter(source: Source, out: Path) -> None:
    from lfm.models.adapter import write_low_rank

    assert source.low_rank is not None and source.over is not None
    write_low_rank(source.ref, digest(source.over), source.task, source.low_rank, out)


def _hint(source: Source) -> str:
    if source.known:
        return ""
    name = next(iter(source.config.get("architectures") or ()), "")
    code = "; its own code (auto_map) is never run" if source.config.get("auto_map") else ""
    return f"transformers has no architecture {name!r}{code}" if name else "its config.json names no architecture"


def _home(source: Source) -> Path:
    homes = {path.parent for path in source.files.values()}
    if len(homes) != 1:
        raise ModelError(f"the tokenizer files of {source.ref} lie in different directories")
    return homes.pop()


def _once(fn: Callable[[], Any]) -> Callable[[], Any]:
    kept: list[Any] = []

    def opened() -> Any:
        if not kept:
            kept.append(fn())
        return kept[0]

    return opened


def _lazy(tensor: LazyTensor | Tensor) -> LazyTensor:
    from lfm.tensors.lazy import lazy

    return lazy(tensor)


def _read(tensor: LazyTensor | Tensor) -> Tensor:
    """A tensor of one's own: a module takes it for its weights, and training it must not reach a model in memory."""
    from lfm.tensors.lazy import Held

    if isinstance(tensor, torch.Tensor):
        return tensor.clone()
    return tensor.read().clone() if isinstance(tensor, Held) else tensor.read()
