"""Sounds as models hear them: one channel of numbers at the sampling rate that they were trained on."""

from __future__ import annotations

import io
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.errors import DataError
from lfm.core.heavy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Sound(NamedTuple):
    """samples: (n,) fp32, ±1 at full scale. rate: how many of them are a second."""

    samples: NDArray[Any]
    rate: int


def sound(audio: Any) -> Sound:
    """From a path, a file's bytes, or (samples, rate); several channels are averaged.

    WAV by scipy; other formats by soundfile, where it is installed. DataError naming what cannot be read.
    """
    if isinstance(audio, str | Path | bytes):
        return _checked(_read(audio), "these bytes" if isinstance(audio, bytes) else str(audio))
    try:
        samples, rate = audio
        given = Sound(np.asarray(samples, dtype=np.float32), int(rate))
    except (TypeError, ValueError):
        raise DataError(f"a sound is a path, a file's bytes or (samples, rate), not {type(audio).__name__}") from None
    return _checked(given, "this array")


def _checked(found: Sound, what: str) -> Sound:
    samples, rate = found
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if samples.ndim != 1 or not len(samples) or rate < 1:
        raise DataError(f"no sound: {what}", why=f"it is {samples.shape} numbers at {rate} Hz")
    if not np.isfinite(samples).all():
        raise DataError(f"no sound: {what}", why="it holds numbers that are not finite")
    return Sound(np.ascontiguousarray(samples, dtype=np.float32), rate)


def _read(audio: str | Path | bytes) -> Sound:
    held = audio if isinstance(audio, bytes) else _bytes(Path(audio))
    if held[:4] in (b"RIFF", b"RIFX", b"RF64") and held[8:12] == b"WAVE":
        return _wav(held, audio)
    what = "these bytes" if isinstance(audio, bytes) else str(audio)
    try:
        import soundfile  # type: ignore[import-not-found]
    except ImportError:
        raise DataError(
            f"not a WAV file: {what}", fix="convert it to WAV, or pip install soundfile, which reads FLAC, OGG and MP3"
        ) from None
    try:
        samples, rate = soundfile.read(io.BytesIO(held), dtype="float32")
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"not a sound: {what}", why=str(error)) from None
    return Sound(samples, int(rate))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"not a sound: {path}", why=error.strerror or str(error)) from None


def _wav(held: bytes, audio: str | Path | bytes) -> Sound:
    import warnings

    from scipy.io import wavfile

    what = "these bytes" if isinstance(audio, bytes) else str(audio)
    if missing := _missing(held):
        raise DataError(f"a WAV file that was cut: {what}", why=f"its header tells of {missing} bytes more")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of chunks that are no sound
            rate, samples = wavfile.read(io.BytesIO(held))
    except Exception as error:  # of a broken file: struct.error, ValueError, UnboundLocalError, …
        raise DataError(f"a WAV file that cannot be read: {what}", why=str(error) or type(error).__name__) from None
    if samples.dtype == np.uint8:
        return Sound((samples.astype(np.float32) - 128) / 128, int(rate))
    if samples.dtype.kind == "i":  # 24 bits lie in the upper ones of 32
        return Sound(samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min), int(rate))
    return Sound(samples.astype(np.float32), int(rate))


STREAMED = 2**31 - 2**16
"""Bytes from which on a header says that its writer did not know how many would come."""


def _missing(held: bytes) -> int:
    """Bytes of a RIFF file that its header tells of and that are not there."""
    told = int.from_bytes(held[4:8], "big" if held[:4] == b"RIFX" else "little")
    return max(0, told + 8 - len(held)) if told < STREAMED else 0


def at_rate(given: Sound, rate: int) -> NDArray[Any]:
    """The samples at another rate (polyphase filtering); as they are where it is theirs."""
    if given.rate == rate:
        return given.samples
    from scipy.signal import resample_poly

    shared = gcd(given.rate, rate)
    return resample_poly(given.samples, rate // shared, given.rate // shared).astype(np.float32)


def wav(given: Sound) -> bytes:
    """The sound as a WAV file of fp32 samples."""
    from scipy.io import wavfile

    sink = io.BytesIO()
    wavfile.write(sink, given.rate, given.samples)
    return sink.getvalue()
