"""Codecs: a checkpoint's tokenizer, image processor or feature extractor, read from its own files without running any
code of theirs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, final

from lfm.core.errors import AccessError, DataError, ModelError
from lfm.core.heavy import np, torch, transformers
from lfm.core.interfaces import Batch
from lfm.models.sound import Sound, at_rate, sound

if TYPE_CHECKING:
    from torch import Tensor

TEXT_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


@final
class TextCodec:
    """Text to token ids, by the checkpoint's own tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    def texts(self, texts: Sequence[str], *, add_special: bool = True, max_length: int | None = None) -> Batch:
        """input_ids and attention_mask (B, T), right-padded; with max_length, longer texts lose their end."""
        rows = self._tokenizer(list(texts), add_special_tokens=add_special)["input_ids"]
        return pad([row[:max_length] for row in rows], pad_id(self._tokenizer))

    def images(self, images: Sequence[Any]) -> Batch:
        raise AccessError("this model takes text, not images")

    def sounds(self, sounds: Sequence[Any]) -> Batch:
        raise AccessError("this model takes text, not sounds")


@final
class ImageCodec:
    """Images to pixel values, by the checkpoint's own processor."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    @property
    def tokenizer(self) -> Any:
        raise AccessError("this model takes images, not text")

    def texts(self, texts: Sequence[str], *, add_special: bool = True, max_length: int | None = None) -> Batch:
        raise AccessError("this model takes images, not text")

    def images(self, images: Sequence[Any]) -> Batch:
        """pixel_values (B, C, H, W) fp32 from paths, PNG/JPEG bytes, or uint8 arrays (H, W) or (H, W, 3)."""
        arrays = [picture(image) for image in images]
        # left to itself the processor takes three rows, or one, for channels
        made = self._processor(images=arrays, return_tensors="pt", input_data_format="channels_last")
        return {"pixel_values": made["pixel_values"]}

    def sounds(self, sounds: Sequence[Any]) -> Batch:
        raise AccessError("this model takes images, not sounds")


@final
class SoundCodec:
    """Sounds to samples or spectra, by the checkpoint's own feature extractor."""

    def __init__(self, extractor: Any, config: Mapping[str, Any] = MappingProxyType({})) -> None:
        self._extractor, self._config = extractor, config

    @property
    def tokenizer(self) -> Any:
        raise AccessError("this model takes sounds, not text")

    def texts(self, texts: Sequence[str], *, add_special: bool = True, max_length: int | None = None) -> Batch:
        raise AccessError("this model takes sounds, not text")

    def images(self, images: Sequence[Any]) -> Batch:
        raise AccessError("this model takes sounds, not images")

    def sounds(self, sounds: Sequence[Any]) -> Batch:
        """input_values (B, samples) or (B, frames, bands), or input_features (B, bands, frames), fp32; attention_mask
        (B, samples) where the model takes one. From paths, bytes or (samples, rate), at the model's own rate."""
        rate = int(self._extractor.sampling_rate)
        given = [sound(each) for each in sounds]
        for each in given:
            self._enough(each, 1, "the model's convolutions need so many")
        heard = [at_rate(each, rate) for each in given]
        # an extractor of spectra pads to its own fixed length; of samples, to the longest
        fixed = "input_features" in self._extractor.model_input_names or getattr(self._extractor, "num_mel_bins", 0)
        made = self._extractor(heard, sampling_rate=rate, return_tensors="pt", **({} if fixed else {"padding": True}))
        return {name: tensor if name.endswith("mask") else tensor.float() for name, tensor in made.items()}

    def learnable(self, audio: Any) -> None:
        """DataError where a sound is too short for the model, or for what its own config masks as it trains."""
        given, config = sound(audio), self._config
        self._enough(given, 1, "the model's convolutions need so many")
        if config.get("apply_spec_augment") and config.get("mask_time_prob"):
            steps = int(config.get("mask_time_length") or 1)
            why = f"as it trains the model masks spans of {steps} steps (mask_time_length in its config.json)"
            self._enough(given, steps, why, ", or apply_spec_augment=false there")

    def _enough(self, given: Sound, steps: int, why: str, otherwise: str = "") -> None:
        rate = int(self._extractor.sampling_rate)
        least = samples_of(self._config, steps)
        if len(given.samples) * rate <= (least - 1) * given.rate:  # at the model's rate
            raise DataError(
                f"a sound of {1000 * len(given.samples) / given.rate:.3g} ms is too short",
                why=f"{why}: {least} samples, which at {rate} Hz are {1000 * least / rate:.3g} ms",
                fix=f"make it longer with silence, or leave it out{otherwise}",
            )


def samples_of(config: Mapping[str, Any], steps: int) -> int:
    """The samples of which convolutions, as the config tells them, make so many steps; 1 where it tells of none."""
    kernels, strides = (config.get(f"conv_{name}") for name in ("kernel", "stride"))
    if not (isinstance(kernels, list | tuple) and isinstance(strides, list | tuple)):
        return 1
    for kernel, stride in zip(reversed(kernels), reversed(strides)):
        steps = (steps - 1) * stride + kernel
    return steps


def picture(image: Any) -> Any:
    """A uint8 array (H, W, 3) from a path, PNG/JPEG bytes, or a uint8 array (H, W) or (H, W, 3)."""
    if isinstance(image, str | Path | bytes):
        import io

        from PIL import Image

        try:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                return np.asarray(opened.convert("RGB"))
        except Exception as error:  # of a broken file: OSError, SyntaxError, DecompressionBombError, …
            what = "these bytes" if isinstance(image, bytes) else str(image)
            raise DataError(f"not an image: {what}", why=str(error) or type(error).__name__) from None
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise DataError(f"an image must be uint8 (H, W) or (H, W, 3), not {array.dtype} {array.shape}")
    return np.repeat(array[..., None], 3, axis=-1) if array.ndim == 2 else array


def pad_id(tokenizer: Any) -> int:
    """The tokenizer's padding id; where it has none any id will do, since padding is masked."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def pad(rows: Sequence[Sequence[int]], fill: int) -> dict[str, Tensor]:
    """input_ids and attention_mask (B, T) of rows of ids, right-padded."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def open_codec(directory: Path, task: str = "") -> TextCodec | ImageCodec | SoundCodec:
    """The codec in a checkpoint's directory; of several the one for this task."""
    where = str(directory)
    try:
        if task == "audio-classification" or _extracts_sound(directory):
            extractor = transformers.AutoFeatureExtractor.from_pretrained(where, local_files_only=True)
            if not (directory / "config.json").is_file():
                return SoundCodec(extractor)
            config = transformers.AutoConfig.from_pretrained(where, local_files_only=True)
            return SoundCodec(extractor, config.to_dict())
        if any((directory / name).exists() for name in TEXT_FILES):
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, local_files_only=True)
            # what is too long is cut, split or refused by whoever reads it: the warning would be a false one
            tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
            return TextCodec(tokenizer)
        return ImageCodec(transformers.AutoImageProcessor.from_pretrained(where, local_files_only=True, backend="pil"))
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ModelError(f"cannot read the tokenizer or processor of {directory}", why=str(error)) from None


def _extracts_sound(directory: Path) -> bool:
    """Whether there is a feature extractor of sounds, and no tokenizer beside it."""
    if any((directory / name).exists() for name in TEXT_FILES) or not (directory / IMAGE_FILES[0]).is_file():
        return False
    return "sampling_rate" in json.loads((directory / IMAGE_FILES[0]).read_text(encoding="utf-8"))


def has_codec(names: set[str]) -> bool:
    return bool(names & {*TEXT_FILES, *IMAGE_FILES})
