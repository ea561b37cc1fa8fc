"""What a teacher tells of a place, in few bytes: its k likeliest ids with their log-probabilities, and what is left.

The level of a log-probability x is n(x) = 1 + (x − least) / wide + eˣ / fine, rounded: steps of `fine` in p where p is
large, since equal ones make Σ p |Δ log p| ≈ Σ |Δ p| least in so many bits, and never wider than `wide` in log p, since
a temperature or a reverse divergence asks for the small ones too. Levels are written as Exp-Golomb codes (which fit
probabilities that fall as 1/rank) of their distance to the place's least, of the order that takes the fewest bits. Ids
are written as Elias–Fano does sorted ones (Elias, J. ACM 21, 1974), in buckets of equal weight rather than equal size:
the vocabulary stands by how often each id was among the likeliest, so that frequent ones take few bits. What is left
out has a level of its own, and the others are scaled to what it leaves.

All ids told (k = V) are kept as they are, in fp32.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, final

from lfm.core.heavy import np
from lfm.models.answers import stream
from lfm.tensors import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

FINE, WIDE, LEAST = 6.6e-5, 0.5, -40.0
"""Steps of levels in p and in log p, and the log-probability below which all are alike."""

LONGEST = 1 << 18
"""Ids that a vocabulary may have: a place in a bucket, and a level, fit one word of 64 bits."""


@final
@dataclass(frozen=True, eq=False)
class Code:
    """k of V ids a place. order: (V,) ids by weight, heaviest first. bits: (buckets,) of each bucket: 2^bits ids."""

    k: int
    order: NDArray[Any]
    bits: NDArray[Any]

    @property
    def vocabulary(self) -> int:
        return len(self.order)

    @property
    def whole(self) -> bool:
        """Whether all ids are told, and so nothing is packed."""
        return self.k == self.vocabulary

    @cached_property
    def _starts(self) -> NDArray[Any]:
        return np.concatenate([[0], np.cumsum(1 << self.bits)])[: len(self.bits)].astype(np.int64)

    @cached_property
    def _for_packing(self) -> NDArray[Any]:
        places = np.arange(self.vocabulary)
        bucket = np.searchsorted(self._starts, places, side="right") - 1
        codes = np.empty(self.vocabulary, np.int64)
        codes[self.order] = (bucket.astype(np.int64) << 32) | (places - self._starts[bucket])
        return np.concatenate([[len(self.bits), self.vocabulary], codes, self.bits]).astype(np.int64)

    @cached_property
    def _for_unpacking(self) -> NDArray[Any]:
        head = [len(self.bits), self.vocabulary, len(_levels()[0])]
        return np.concatenate([head, self.bits, self._starts, self.order]).astype(np.int64)


def code_for(k: int, weights: NDArray[Any]) -> Code:
    """The code in which ids of such weights, (V,), take few bits: how often each was among the likeliest, or all alike.

    Buckets hold 2^b ids and 1 / k of the weight at most, where that is more than one id's.
    """
    vocabulary = len(weights)
    assert 1 <= k <= vocabulary <= LONGEST, (k, vocabulary)
    order = np.argsort(-weights, kind="stable").astype(np.int32)
    spread = weights[order].astype(np.float64) + 0.3  # an id not seen yet may still come
    upto = np.concatenate([[0.0], np.cumsum(spread / spread.sum())])
    bits: list[int] = []
    at = 0
    while at < vocabulary:
        b = 0
        while at + (2 << b) <= vocabulary and upto[at + (2 << b)] - upto[at] <= 1 / k:
            b += 1
        bits.append(b)
        at += 1 << b
    return Code(k, order, np.array(bits, np.int64))


def encode(code: Code, ids: NDArray[Any], logprobs: NDArray[Any]) -> bytes:
    """The bytes of places (n, k): distinct ids, and natural-log probabilities that add up to 1 at most (−∞ is 0)."""
    n, k = ids.shape
    assert k == code.k and logprobs.shape == ids.shape, (k, code.k)
    if code.whole:
        whole = np.empty((n, k), np.float32)
        np.put_along_axis(whole, ids.astype(np.int64), logprobs.astype(np.float32), 1)
        return whole.tobytes()
    assert not n or 0 <= ids.min() <= ids.max() < code.vocabulary
    ids, told = np.ascontiguousarray(ids, np.int32), np.ascontiguousarray(logprobs, np.float32)
    widest = 34 + k + len(code.bits) + k * (int(code.bits.max()) + 32)
    made = np.zeros(n * widest // 64 + 3, np.uint64)
    room, flags = np.empty(5 * k + len(code.bits) + 1, np.int64), np.zeros(1, np.int64)
    params = np.array([LEAST, 1 / WIDE, 1 / FINE])
    _call(
        "pack", raw=ids, stride=len(made), out=made, codes=code._for_packing, params=params, keys=told,
        scratch=room, flags=flags, width=k, count=n,
    )  # fmt: skip
    return made.view(np.uint8)[: (int(flags[0]) + 7) // 8].tobytes()


def decode(code: Code, packed: bytes | memoryview, n: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """ids int32 and log-probabilities fp32 (n, k) of n places, in an order of the code's own. They must be bytes that
    encode made: whoever keeps them keeps a checksum."""
    k = code.k
    if code.whole:
        ids = np.broadcast_to(np.arange(k, dtype=np.int32), (n, k))
        return ids, np.frombuffer(packed, np.float32).reshape(n, k)
    words = np.zeros(len(packed) // 8 + 3, np.uint64)
    words.view(np.uint8)[: len(packed)] = np.frombuffer(packed, np.uint8)
    ids, told = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
    room, flags = np.empty(k, np.int64), np.zeros(1, np.int64)
    _call(
        "unpack", raw=words, stride=len(words), out=ids, codes=code._for_unpacking, params=_levels(), keys=told,
        scratch=room, flags=flags, width=k, count=n,
    )  # fmt: skip
    return ids, told


@cache
def _levels() -> NDArray[Any]:
    """fp32 (2, levels): the log-probability in the middle of each level, and its probability; the first is −∞."""
    count = 2 + math.ceil(-LEAST / WIDE + 1 / FINE)
    wanted = np.arange(1, count) - 1.0
    low, high = np.full(count - 1, LEAST), np.full(count - 1, 1e-3)
    for _ in range(60):  # n(x) rises: halve
        middle = (low + high) / 2
        below = (middle - LEAST) / WIDE + np.exp(middle) / FINE < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    logs = np.concatenate([[-np.inf], np.minimum((low + high) / 2, 0.0)])
    return np.stack([logs, np.exp(logs)]).astype(np.float32)


def _call(name: str, *, stride: int, width: int, count: int, **arrays: NDArray[Any]) -> None:
    order = ("codes", "params", "keys", "scratch", "flags")
    pointers = [arrays[each].ctypes.data for each in order]
    kernel = _kernel(name)
    kernel(arrays["raw"].ctypes.data, stride, arrays["out"].ctypes.data, *pointers, width, 0, count)


@cache
def _kernel(name: str) -> Callable[..., None]:
    helpers = [compiled.inlined(each) for each in (stream.length, stream.lowest, stream.put, stream.get, stream.power)]
    loop = textwrap.dedent(inspect.getsource(getattr(stream, name))).replace(f"def {name}(", f"def {compiled.ENTRY}(")
    return compiled.load("\n\n".join([*helpers, loop]), reassociate=True)
