"""What a checkpoint's config, tokenizer and headers tell of it before any weight is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm.core.errors import CorruptError
from lfm.core.heavy import nn, torch
from lfm.core.interfaces import Layout
from lfm.core.model import Facts

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import LazyTensor
    from lfm.models.checkpoint import Source

CONFIG = "config.json"
SOUND = ("conv_stride", "num_mel_bins", "feature_projection_input_dim")
"""Keys by which a config tells how it hears: the strides over samples, or the bands of a spectrum."""


def task_of(config: Mapping[str, Any]) -> str:
    """What a checkpoint does, from the class its config names."""
    name = next(iter(config.get("architectures") or ()), "")
    if not name:
        return ""
    if name.endswith("ForMaskedLM"):
        return "masked-lm"
    if name.endswith("ForAudioClassification"):
        return "audio-classification"
    if name.endswith("ForSequenceClassification"):
        return "audio-classification" if any(key in config for key in SOUND) else "text-classification"
    if name.endswith("ForImageClassification"):
        return "image-classification"
    if name.endswith(("ForConditionalGeneration", "ForCausalLM", "LMHeadModel")):
        return "seq2seq-lm" if config.get("is_encoder_decoder") else "causal-lm"
    return "encoder"


def facts(source: Source) -> Facts:
    """What the headers and the config tell. CorruptError naming a value of the wrong kind."""
    from lfm.tensors.lazy import code_of
    from lfm.tensors.safetensors_file import DTYPES

    config = source.config
    inner = next((config[k] for k in ("text_config", "vision_config") if isinstance(config.get(k), dict)), {})
    look = {**inner, **config}

    def whole(*keys: str) -> int:
        """The first of these keys that the config has, as a whole number; 0 where stages have one each."""
        value = next((look[key] for key in keys if look.get(key)), 0)
        if isinstance(value, str | dict):
            key = next(key for key in keys if look.get(key))
            raise CorruptError(f"{source.ref}/{CONFIG}: {key} is {value!r}", why="it must be a whole number")
        return 0 if isinstance(value, list) else int(value)

    sizes: dict[str, int] = {}
    for tensor in source.stored.values():
        sizes[code_of(tensor)] = sizes.get(code_of(tensor), 0) + _elements(tensor)
    labels = config.get("id2label") or {}
    if not isinstance(labels, dict) or not all(str(key).isdecimal() for key in labels):
        raise CorruptError(f"{source.ref}/{CONFIG}: id2label is {labels!r}", why="it maps class numbers to their names")
    return Facts(
        task=source.task,
        architecture=next(iter(config.get("architectures") or ()), ""),
        parameters=sum(sizes.values()),
        bytes=sum(count * DTYPES[code][1] for code, count in sizes.items()),
        dtype=DTYPES[max(sizes, key=lambda k: sizes[k])][0] if sizes else "",
        vocabulary=whole("vocab_size"),
        vocabulary_digest=_vocabulary(source.files),
        labels=tuple(str(labels[key]) for key in sorted(labels, key=int)),
        layers=whole("num_hidden_layers", "n_layer", "num_layers", "encoder_layers"),
        width=whole("hidden_size", "n_embd", "d_model"),
        heads=whole("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
        context=_context(whole("max_position_embeddings", "n_positions", "n_ctx"), source.files),
        image=_image(look) if source.task == "image-classification" else (),
    )


def _image(look: Mapping[str, Any]) -> tuple[int, ...]:
    """(C, H, W) as a config tells it; empty where it does not."""
    size = look.get("image_size")
    sides = size if isinstance(size, list) and len(size) == 2 else [size, size]
    shape = tuple(n for n in (look.get("num_channels", 3), *sides) if isinstance(n, int) and n > 0)
    return shape if len(shape) == 3 else ()


def on_meta(build: Callable[[], nn.Module]) -> Any:
    """The module, built where weights take no memory and have no values."""
    from lfm.models.quiet import quiet

    with quiet(), torch.device("meta"):
        return build()


def layout(build: Callable[[], nn.Module]) -> Layout:
    """What the architecture tells of its layers: it is built on the meta device, where weights take no memory."""
    from lfm.models import structure

    module = on_meta(build)
    kinds: dict[str, str] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Embedding):
            kinds[name] = "embedding"
        elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            kinds[name] = "convolution" if layer.groups == 1 else "grouped convolution"
    for name, layer, *_ in structure.linears(module):
        kinds[name] = "conv1d" if structure.transposed(layer) else "linear"
    tied = dict(getattr(module, "all_tied_weights_keys", None) or {})
    stored = _as_stored(module)
    rows = _by_token(module)
    by_token = frozenset(name for name, p in stored.items() if id(p) in rows)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    return Layout(kinds, tied, shapes, by_token, _renamed(module, stored))


def _as_stored(module: Any) -> dict[str, Any]:
    """The module's tensors under the names that checkpoints have, in the order of the module."""
    state = module.state_dict(keep_vars=True)
    if not hasattr(module, "save_pretrained"):
        return state
    from transformers.core_model_loading import revert_weight_conversion

    by_name = {name: place for place, name in enumerate(state)}
    by_tensor = {id(tensor): place for place, tensor in reversed(list(enumerate(state.values())))}
    stored = revert_weight_conversion(module, dict(state))
    # what was cut or joined on the way has no place of its own; it lies in blocks, whose other tensors have one
    places = {name: by_name.get(name, by_tensor.get(id(tensor), len(state))) for name, tensor in stored.items()}
    return {name: stored[name] for name in sorted(stored, key=places.__getitem__)}


def _renamed(module: Any, stored: Mapping[str, Any]) -> dict[str, str]:
    """A tensor's name in the module → another that checkpoints have for it; one that several are made of has none."""
    state = module.state_dict(keep_vars=True)
    known = {id(tensor): name for name, tensor in stored.items() if name not in state}
    return {name: known[id(tensor)] for name, tensor in state.items() if id(tensor) in known and name not in stored}


def _by_token(module: Any) -> set[int]:
    """The parameters, by identity, of the embeddings that the module declares as its input's and its output's."""
    if not hasattr(module, "get_input_embeddings"):
        return set()
    try:
        tables = [module.get_input_embeddings(), module.get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        return set()
    return {id(p) for table in tables if table is not None for p in table.parameters(recurse=False)}


def _context(places: int, files: Mapping[str, Path]) -> int:
    """The longest input in tokens: of the positions some models keep a few for padding, as their tokenizers know."""
    if not places or "tokenizer_config.json" not in files:
        return places
    try:
        known = json.loads(files["tokenizer_config.json"].read_text(encoding="utf-8")).get("model_max_length")
    except (ValueError, AttributeError):
        return places  # told of where the tokenizer is opened
    return min(places, int(known)) if isinstance(known, int | float) and known > 0 else places


def _vocabulary(files: Mapping[str, Path]) -> str:
    """sha256 over tokens and their ids, however the tokenizer's file pads, truncates or is laid out; "" without one."""
    path = next((files[n] for n in ("tokenizer.json", "vocab.txt", "vocab.json") if n in files), None)
    if path is None:
        return ""
    text = path.read_text(encoding="utf-8")
    try:
        told: Any = None if path.suffix == ".txt" else json.loads(text)
        if told is None:
            told = {token: i for i, token in enumerate(text.splitlines())}
        elif path.name == "tokenizer.json":
            tokens, added = told["model"]["vocab"], told.get("added_tokens") or ()
            ids = tokens if isinstance(tokens, dict) else {piece: i for i, (piece, *_) in enumerate(tokens)}
            told = {**ids, **{token["content"]: token["id"] for token in added}}
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{path} tells no vocabulary", why=str(error), fix="fetch or save it again") from None
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _elements(tensor: LazyTensor | Tensor) -> int:
    count = 1
    for side in tensor.shape:
        count *= side
    return count
