"""Images and sounds in records: as files name them, as they are written, how large they are, what they say."""

from __future__ import annotations

import base64
import hashlib
import io
from math import ceil
from pathlib import Path
from typing import Any

from lfm.core.errors import DataError
from lfm.core.heavy import np
from lfm.data.shapes import example

MEDIA = ("image", "audio")
"""Fields of records that hold one."""
PATCH = 16
"""Pixels on the side of an image token; an estimate for planning."""
FRAME = 0.02
"""Seconds of a sound's token; likewise."""


def held(kind: str, value: Any, folder: Path) -> Any:
    """An image or a sound of a file's row: bytes, the path of a file that is there, or a sound's (samples, rate)."""
    if isinstance(value, dict):
        if kind == "audio" and value.get("array") is not None:
            return np.asarray(value["array"], dtype=np.float32), value.get("sampling_rate") or 0
        inside = value.get("bytes")
        if isinstance(inside, str):
            try:
                return base64.b64decode(inside, validate=True)
            except ValueError:
                raise DataError(f"the bytes of `{kind}` are not base64", fix=example(kind)) from None
        value = inside if inside is not None else value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, str) and value:
        place = folder / value
        if not place.is_file():
            raise DataError(f"`{kind}`: there is no file {place}", fix="paths are looked for beside the data file")
        return str(place)
    said = "empty" if value in ("", b"") else type(value).__name__
    raise DataError(f"`{kind}` is a path or {{'bytes': …}}, not {said}", fix=f"a right line: {example(kind)}")


def told(kind: str, value: Any, *, base64_bytes: bool) -> Any:
    """As a file's row holds it: a path, or bytes (PNG, WAV)."""
    if isinstance(value, str | Path):
        return str(Path(value).absolute())
    if not isinstance(value, bytes):
        value = _png(value) if kind == "image" else _wav(value)
    return {"bytes": base64.b64encode(value).decode() if base64_bytes else value}


def _png(image: Any) -> bytes:
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(sink, format="PNG")
    return sink.getvalue()


def _wav(audio: Any) -> bytes:
    from lfm.models.sound import sound, wav

    return wav(sound(audio))


def tokens(kind: str, value: Any) -> int:
    """About how many tokens a model reads it as."""
    if kind == "audio":
        from lfm.models.sound import sound

        try:
            samples, rate = sound(value)
        except DataError:
            return 1
        return ceil(len(samples) / rate / FRAME)
    return _patches(value)


def meaning(kind: str, value: Any) -> list[Any]:
    """What a digest takes of it: its pixels or samples, wherever and however they are stored."""
    if kind == "image":
        from lfm.models.codec import picture

        pixels = np.ascontiguousarray(picture(value))
        return [*pixels.shape, hashlib.sha256(pixels.tobytes()).hexdigest()]
    from lfm.models.sound import sound

    samples, rate = sound(value)
    return [len(samples), rate, hashlib.sha256(samples.tobytes()).hexdigest()]


def _patches(image: Any) -> int:
    from PIL import Image

    if isinstance(image, str | Path | bytes):
        try:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                width, height = opened.size
        except Exception:  # a broken file: the run will name it
            return 1
    else:
        height, width = np.asarray(image).shape[:2]
    return ceil(width / PATCH) * ceil(height / PATCH) + 1
