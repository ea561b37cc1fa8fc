"""Stored bits to numbers and back, and numbers from nowhere. Compiled into every kernel; never called from Python.

Each works on one block: `raw` is a chunk's bytes, `at` the block's first element, `count` how many. They return whether
any element was a NaN or an infinity. Codes: 0 fp64, 1 fp32, 2 bf16, 3 fp16 (CODES).
"""

from __future__ import annotations

from lfm.core.heavy import np


def decode(raw, code, at, count, row):
    bad = 0
    if code == 0:
        f8 = raw.view(np.float64)[at : at + count]
        for i in range(count):
            value = f8[i]
            row[i] = value
            bad |= (value - value) != 0.0
    elif code == 1:
        f4 = raw.view(np.float32)[at : at + count]
        u4 = raw.view(np.uint32)[at : at + count]
        for i in range(count):
            row[i] = f4[i]
            bad |= (u4[i] & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    elif code == 2:
        b2 = raw.view(np.uint16)[at : at + count]
        for i in range(count):
            bits = np.uint32(np.uint32(b2[i]) << np.uint32(16))
            row[i] = bits.view(np.float32)
            bad |= (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    else:
        h2 = raw.view(np.uint16)[at : at + count]
        for i in range(count):
            half = np.uint32(h2[i])
            sign = (half & np.uint32(0x8000)) << np.uint32(16)
            # the exponent's bias differs by 112; multiplying mends it, and subnormals with it
            size = np.float32(
                np.uint32((half & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32) * np.float32(2.0**112)
            )
            special = np.uint32(0x7F800000) if (half & np.uint32(0x7C00)) == np.uint32(0x7C00) else np.uint32(0)
            row[i] = np.uint32(size.view(np.uint32) | sign | special).view(np.float32)
            bad |= (half & np.uint32(0x7C00)) == np.uint32(0x7C00)
    return bad != 0


def encode(row, code, raw, at, count):
    bad = 0
    if code == 0:
        f8 = raw.view(np.float64)[at : at + count]
        for i in range(count):
            f8[i] = row[i]
            bad |= (row[i] - row[i]) != 0.0
    elif code == 1:
        f4 = raw.view(np.float32)[at : at + count]
        for i in range(count):
            single = np.float32(row[i])
            f4[i] = single
            bad |= (single - single) != np.float32(0.0)
    elif code == 2:
        b2 = raw.view(np.uint16)[at : at + count]
        for i in range(count):
            bits = odd(row[i])
            up = np.uint32(np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)  # whose payload must not be carried over
            even = np.uint32(bits | np.uint32(0x00400000)) if nan else np.uint32(bits + up)
            b2[i] = even >> np.uint32(16)
            bad |= (even & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    else:
        h2 = raw.view(np.uint16)[at : at + count]
        for i in range(count):
            bits = odd(row[i])
            size = np.uint32(bits & np.uint32(0x7FFFFFFF))
            even = np.uint32(size + np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1)))
            normal = np.uint32(even - np.uint32(112 << 23)) >> np.uint32(13)
            # below 2⁻¹⁴ the spacing is 2⁻²⁴: adding 0.5 rounds to it
            raised = np.float32(size.view(np.float32) + np.float32(0.5))
            small = np.uint32(raised.view(np.uint32) - np.uint32(0x3F000000))
            half = small if size < np.uint32(113 << 23) else normal
            beyond = np.uint32(0x7E00) if size > np.uint32(0x7F800000) else np.uint32(0x7C00)
            half = beyond if size >= np.uint32(0x477FF000) else half
            h2[i] = half | ((bits >> np.uint32(16)) & np.uint32(0x8000))
            bad |= size >= np.uint32(0x477FF000)  # 65520 and beyond round to infinity
    return bad != 0


def odd(value):
    """The bits of value in fp32, rounded such that rounding them once more is right: to odd, where it is not exact.

    What fp32 cannot hold of the fraction is gathered in its last bit. Below 2⁻¹²⁶ it is rounded to nearest.
    """
    bits = np.float64(value).view(np.uint64)
    lost = np.uint64(0x20000000) if (bits & np.uint64(0x1FFFFFFF)) != np.uint64(0) else np.uint64(0)
    kept = np.uint64((bits & np.uint64(0xFFFFFFFFE0000000)) | lost)
    return np.float32(kept.view(np.float64)).view(np.uint32)


def uniform(key, at):
    """A number in [0, 1) by key and position: the finaliser of SplitMix64 (Steele, Lea & Flood 2014)."""
    z = key + np.uint64(at + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.float64(np.int64(z >> np.uint64(11))) * 2.0**-53
