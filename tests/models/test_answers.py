"""Answers kept in few bytes: what comes back of what was told, and of shards that were cut short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm.core.errors import CorruptError
from lfm.core.model import Facts
from lfm.models import load
from lfm.models.answers import CODE, manifest_of, model_of, write_code
from lfm.models.answers.codec import FINE, LEAST, WIDE, code_for, decode, encode
from lfm.models.answers.shards import Shards, Writer, bin_of, index_of

ODD = ("one-hot", "even", "zipf", "most of it left out", "some impossible", "tiny", "two alike")


def places(rng: Any, kind: str, n: int, k: int, vocabulary: int) -> tuple[Any, Any]:
    """Distinct ids and the log-probabilities of the k likeliest of `vocabulary`, best first."""
    ids = np.array([rng.choice(vocabulary, k, replace=False) for _ in range(n)], np.int32).reshape(n, k)
    rank = np.arange(1, k + 1)
    share = {
        "one-hot": (rank == 1) * 1.0,
        "even": np.full(k, 1 / vocabulary),
        "zipf": 1 / rank / np.log(vocabulary + 1.8),
        "most of it left out": np.full(k, 1e-9),
        "some impossible": (rank <= max(1, k // 2)) / k,
        "tiny": 10.0 ** -np.minimum(5.0 * rank, 300.0),
        "two alike": (rank <= 2) / 2 / (1 if k > 1 else 2),
    }[kind]
    noise = np.exp(rng.normal(0, 0.3, (n, k))) if kind == "zipf" else 1.0
    share = np.sort(share * noise * np.ones((n, k)), 1)[:, ::-1]
    with np.errstate(divide="ignore"):
        return ids, np.log(share / np.maximum(share.sum(1, keepdims=True), 1.0)).astype(np.float32)


def sorted_by_id(ids: Any, told: Any) -> tuple[Any, Any]:
    order = np.argsort(ids, 1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(told, order, 1)


@settings(max_examples=40)
@given(st.data())
def test_ids_come_back_as_they_were_and_probabilities_within_the_bound(draw: st.DataObject) -> None:
    """|Δ log p| ≤ half a step of the compander, and a scale by which the rest is right: |Δ(1 − Σ p)| ≤ half a step."""
    vocabulary = draw.draw(st.sampled_from([2, 3, 17, 64, 65, 1000, 4096, 50257, 151936, 200_000]), "V")
    k = draw.draw(st.integers(1, min(vocabulary, 130)), "k")
    kind, n = draw.draw(st.sampled_from(ODD), "kind"), draw.draw(st.integers(0, 5), "n")
    rng = np.random.default_rng(draw.draw(st.integers(0, 2**32), "seed"))
    ids, told = places(rng, kind, n, k, vocabulary)
    weights = rng.zipf(1.3, vocabulary) if draw.draw(st.booleans(), "weighed") else np.zeros(vocabulary)
    code = code_for(k, weights)
    packed = encode(code, ids, told)
    (got, back), (ids, told) = sorted_by_id(*decode(code, packed, n)), sorted_by_id(ids, told)
    assert np.array_equal(got, ids)
    if code.whole:
        assert np.array_equal(back, told)
        return
    assert np.array_equal(np.isinf(back), np.isinf(told))
    p, q = np.exp(told.astype(np.float64)), np.exp(back.astype(np.float64))
    step = 1 / (1 / WIDE + p / FINE)
    left, kept = 1 - p.sum(1), 1 - q.sum(1)
    assert (np.abs(kept - left) <= FINE / 2 + 1e-5).all()
    # all are moved by one factor, from the sum of what was rounded to what was told to be kept
    shift = np.abs(np.log(np.maximum(q.sum(1), 1e-300) / np.maximum(p.sum(1), 1e-300)))[:, None]
    moved = np.nan_to_num(step / 2 + shift + _drift(p, step)) + 2e-3 * step + 1e-5
    within = np.isfinite(told) & (told > LEAST)
    assert (np.abs(back[within] - told[within]) <= moved[within]).all()


def _drift(p: Any, step: Any) -> Any:
    """The most that rounding moves the sum of what is kept, in log: what the scale then takes back."""
    return (p * np.expm1(step / 2)).sum(1, keepdims=True) / np.maximum(p.sum(1, keepdims=True), 1e-300)


def test_frequent_ids_take_fewer_bits() -> None:
    """By frequency, not by size: an id of one in two is told in a bucket of its own."""
    rng = np.random.default_rng(0)
    ids = np.stack([np.unique(rng.zipf(1.2, 4000) % 50257)[:64] for _ in range(400)]).astype(np.int32)
    told = np.full(ids.shape, np.log(1 / 128), np.float32)
    plain, weighed = (code_for(64, w) for w in (np.zeros(50257), np.bincount(ids.reshape(-1), minlength=50257)))
    assert len(encode(weighed, ids, told)) < 0.7 * len(encode(plain, ids, told))
    assert int((1 << plain.bits).sum()) == 50257 and int((1 << weighed.bits).sum()) == 50257


def test_uniform_ids_take_no_more_than_elias_fano(n: int = 500) -> None:
    """64 of 50257 with no knowledge of them: 9 bits and 2.6 of unary each; and all values alike, 1 bit and a header."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.choice(50257, 64, replace=False) for _ in range(n)]).astype(np.int32)
    code = code_for(64, np.zeros(50257))
    told = np.full(ids.shape, np.log(1 / 128), np.float32)
    assert len(encode(code, ids, told)) / n <= (64 * 9 + 64 + len(code.bits) + 34 + 64) / 8 + 1


def test_what_was_added_to_shards_is_there_and_a_torn_end_is_cut_off(tmp_path: Path) -> None:
    rows = [(bytes([i]) * 16, bytes([i]) * (3 + 5 * i), i) for i in range(12)]

    def add(place: Path, some: list[Any]) -> None:
        keys, packed, counts = zip(*some, strict=True)
        Writer(place, limit=100).add(keys, packed, counts)

    add(tmp_path / "whole", rows)
    for cut in range(6):
        place = tmp_path / f"cut{cut}"
        add(place, rows[:7])
        last = max(i for i in range(9) if index_of(place, i).exists())
        with bin_of(place, last).open("r+b") as held, index_of(place, last).open("r+b") as index:
            held.seek(0, 2)
            index.seek(0, 2)
            if cut < 3:  # written, and not told of yet; or told of by half an entry
                held.write(b"x" * cut)
                index.write(b"y" * cut)
            else:  # told of, and lost
                held.truncate(held.tell() - cut + 2)
        writer = Writer(place, limit=100)
        assert writer.count == (7 if cut < 3 else 6)
        add(place, rows[writer.count :])
        for file in (tmp_path / "whole").iterdir():
            assert (place / file.name).read_bytes() == file.read_bytes()
    count = len(list((tmp_path / "whole").glob("*.bin")))
    assert count > 1
    shards = Shards(tmp_path / "whole", count)
    for number, (key, packed, places) in enumerate(rows):
        assert shards.find([key])[0] == number
        assert bytes(shards.read(number)) == packed and shards.entries[number]["places"] == places
    assert shards.find([b"?" * 16])[0] == -1


def test_a_directory_of_another_format_is_told_of(tmp_path: Path) -> None:
    code = code_for(2, np.zeros(9))
    Writer(tmp_path / "w").add([b"k" * 16], [encode(code, *places(np.random.default_rng(0), "zipf", 3, 2, 9))], [3])
    write_code(code, tmp_path / "w" / CODE)
    made = model_of(tmp_path / "w", manifest_of(tmp_path / "w", "t", "d", Facts(), 2, 9))
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out")
    assert load(tmp_path / "out").digest == made.digest
    text = (tmp_path / "out" / "answers.json").read_text()
    for wrong, what in (
        (text.replace('"format": 2', '"format": 9'), "of format 9"),
        ("{}", "does not describe"),
        (text.replace('"labels"', '"lacels"'), "not as it was written"),
        (text.replace('"context": ', '"context": 9'), "not as it was written"),
        (text.replace('"digest"', '"gigest"'), "none is written there"),
    ):
        (tmp_path / "out" / "answers.json").write_text(wrong)
        with pytest.raises(CorruptError, match=what):
            load(tmp_path / "out")
