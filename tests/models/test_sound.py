"""Sounds: files of all sorts give the same samples, at the rate the model wants, and broken ones are named."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.io import wavfile

import tiny
from lfm.core import Codec, Gradients, Logits
from lfm.core.errors import AccessError, DataError
from lfm.data.task import task_for
from lfm.models import forward, load
from lfm.models.sound import Sound, at_rate, sound, wav

SINE = np.sin(np.arange(800) / 9).astype(np.float32) * 0.5
HEARERS = [tiny.hearer, tiny.spectral, tiny.listener]


@pytest.mark.parametrize(("kind", "steps"), [("uint8", 2**7), ("int16", 2**15), ("int32", 2**31), ("float32", 0)])
def test_every_width_of_samples_is_heard_alike(kind: str, steps: int, tmp_path: Path) -> None:
    """Of 8 bits (unsigned) to 32: the same sine to the rounding of its own width."""
    whole = SINE if not steps else np.round(SINE.astype(np.float64) * steps) + (steps if kind == "uint8" else 0)
    wavfile.write(tmp_path / "a.wav", 8000, whole.astype(kind))
    found = sound(tmp_path / "a.wav")
    assert found.rate == 8000 and found.samples.dtype == np.float32
    np.testing.assert_allclose(found.samples, SINE, atol=1 / steps if steps else 0)
    np.testing.assert_array_equal(sound((tmp_path / "a.wav").read_bytes()).samples, found.samples)


def test_twenty_four_bits_by_another_writer() -> None:
    sink = io.BytesIO()
    with wave.open(sink, "wb") as file:
        file.setparams((1, 3, 8000, len(SINE), "NONE", ""))
        file.writeframes(b"".join(round(x * 2**23).to_bytes(3, "little", signed=True) for x in SINE.tolist()))
    np.testing.assert_allclose(sound(sink.getvalue()).samples, SINE, atol=2**-23)


def test_channels_are_averaged_and_a_sound_comes_back_from_its_own_file() -> None:
    both = Sound(np.stack([SINE, -SINE / 2], axis=1), 8000)
    np.testing.assert_allclose(sound(both).samples, SINE / 4, atol=1e-7)
    np.testing.assert_array_equal(sound(wav(Sound(SINE, 11025))).samples, SINE)


@pytest.mark.parametrize("rate", [8000, 44100, 16000])
def test_at_another_rate_a_tone_keeps_its_pitch_and_height(rate: int) -> None:
    """500 Hz for half a second: n samples at 16 kHz, one peak in the spectrum, as high as before."""
    tone = np.sin(2 * np.pi * 500 * np.arange(rate // 2) / rate).astype(np.float32)
    made = at_rate(Sound(tone, rate), 16000)
    assert made.dtype == np.float32 and len(made) == 8000
    spectrum = np.abs(np.fft.rfft(made))
    assert int(spectrum.argmax()) == 250 and spectrum[250] == pytest.approx(4000, rel=0.02)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"", "not a WAV file"),
        (b"OggS" + bytes(40), "soundfile"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "was cut"),
        (b"RIFF\x08\0\0\0WAVEfmt ", "cannot be read"),
        (wav(Sound(SINE, 8000))[:40], "was cut"),
        ((np.array([np.nan], np.float32), 8000), "not finite"),
        ((np.zeros(0, np.float32), 8000), "no sound"),
        ((SINE, 0), "0 Hz"),
        (7, "a path, a file's bytes or"),
    ],
)
def test_what_is_no_sound_is_refused(given: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        sound(given)


def test_a_file_that_was_cut_is_refused_and_one_that_was_streamed_is_not() -> None:
    whole = wav(Sound(np.linspace(-1, 1, 400, dtype=np.float32), 8000))
    with pytest.raises(DataError, match="cut") as caught:
        sound(whole[:-100])
    assert "100 bytes more" in str(caught.value)
    streamed = whole[:4] + b"\xff\xff\xff\xff" + whole[8:]
    assert len(sound(streamed).samples) == 400


@pytest.mark.parametrize("make", HEARERS)
def test_a_classifier_of_sounds_answers_as_in_transformers(make: Any, tmp_path: Path) -> None:
    model, records = load(make(tmp_path / "base")), tiny.tones(2)
    assert (model.facts.task, model.facts.labels, model.facts.layers) == ("audio-classification", tiny.TONES, 2)
    task = task_for(records, model.ask(Codec), model.facts)
    batch = task.collate(records)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "base")
    more = {"padding": True} if make is tiny.hearer else {}
    given = extractor([r.audio[0] for r in records], sampling_rate=tiny.RATE, return_tensors="pt", **more)
    with torch.no_grad():
        expected = transformers.AutoModelForAudioClassification.from_pretrained(tmp_path / "base").eval()(**given)
    torch.testing.assert_close(model.ask(Logits).logits(batch), expected.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(batch["labels"], torch.tensor([0, 1, 2] * 2)) and task.truth(records) == list(tiny.TONES) * 2
    assert forward(model.ask(Gradients).module(), batch).shape == (6, 3)


def test_the_rate_is_the_models_whatever_the_files(tmp_path: Path) -> None:
    """The same tones at 16 and 48 kHz come in as nearly the same samples."""
    codec = load(tiny.hearer(tmp_path / "base")).ask(Codec)
    tone = [(np.sin(2 * np.pi * 300 * np.arange(rate // 5) / rate).astype(np.float32), rate) for rate in (16000, 48000)]
    values = codec.sounds(tone)["input_values"]
    assert values.shape == (2, 3200)
    torch.testing.assert_close(values[0, 100:-100], values[1, 100:-100], atol=0.02, rtol=0)


def test_each_codec_takes_its_own_kind_of_thing_only(tmp_path: Path) -> None:
    hearer = load(tiny.hearer(tmp_path / "a")).ask(Codec)
    for ask in (lambda: hearer.tokenizer, lambda: hearer.texts(["a"]), lambda: hearer.images([])):
        with pytest.raises(AccessError, match="this model takes sounds"):
            ask()
    for make in (tiny.vit, tiny.masked):
        with pytest.raises(AccessError, match="not sounds"):
            load(make(tmp_path / make.__name__)).ask(Codec).sounds([])


def test_a_tokenizer_beside_the_extractor_is_not_taken_for_it(tmp_path: Path) -> None:
    """Fine-tuned speech models often keep the files of the transcriber they come from."""
    tiny.hearer(tmp_path / "base")
    (tmp_path / "base" / "vocab.json").write_text(json.dumps({"a": 0}))
    assert load(tmp_path / "base").ask(Codec).sounds(tiny_sound())["input_values"].shape == (1, 1600)


def tiny_sound() -> list[Any]:
    return [tiny.tones(1)[0].audio]
