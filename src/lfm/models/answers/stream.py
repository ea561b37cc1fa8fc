"""The codec's loops over places, compiled by lfm.tensors.compiled; never called from Python.

A place is: its least level (15 bits), the order e of its Exp-Golomb codes (4), the level of what is left out (15); how
many ids each bucket holds, in unary; how many bits each level has above e, in unary; then of each id, bucket by bucket,
its place within the bucket and the lower bits of its level above the least. Bits are written lowest first, into words
of 64 that are zero before.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lfm.core.heavy import np

if TYPE_CHECKING:
    from numba.np.numpy_support import carray


def length(value):
    """The number of bits of a whole number from 1 to 2²⁴ − 1: the exponent of its fp32."""
    return np.int32(np.float32(np.int32(value)).view(np.uint32) >> np.uint32(23)) - np.int32(126)


def lowest(word):
    """The place of the lowest bit that is set, by the exponent of its fp64 (the highest bit is its sign's)."""
    one = np.int64(word & (~word + np.uint64(1)))
    return np.int64((np.float64(one).view(np.uint64) >> np.uint64(52)) & np.uint64(0x7FF)) - 1023


def put(made, at, value, bits):
    """Or a number into the words from bit `at` on; where it ends."""
    inside = np.uint64(at & 63)
    made[at >> 6] |= value << inside
    made[(at >> 6) + 1] |= (value >> np.uint64(1)) >> (np.uint64(63) - inside)
    return at + bits


def get(made, at):
    """The 64 bits from bit `at` on."""
    inside = np.uint64(at & 63)
    return (made[at >> 6] >> inside) | ((made[(at >> 6) + 1] << np.uint64(1)) << (np.uint64(63) - inside))


def power(x):
    """eˣ of −80 to 0 in fp32: 2ᶠ by a polynomial of degree 5 on [0, 1], right to 2e-7, and its exponent."""
    t = x * np.float32(1.44269504)
    whole = np.int32(t) - np.int32(1)  # truncated towards zero, so that what is left is in [0, 1]
    f = t - np.float32(whole)
    found = np.float32(1.8775767e-3)
    found = found * f + np.float32(8.9893397e-3)
    found = found * f + np.float32(5.5826318e-2)
    found = found * f + np.float32(2.4015361e-1)
    found = found * f + np.float32(6.9315308e-1)
    found = found * f + np.float32(9.9999994e-1)
    return found * np.uint32((whole + np.int32(127)) << np.int32(23)).view(np.float32)


def pack(raw_, stride, out, codes_, params_, keys_, scratch_, flags_, width, start, count):
    """raw_: ids, int32 (count, width). keys_: log-probabilities, fp32, alike. codes_: int64: buckets, ids; by id its
    bucket · 2³² + its place in it; the buckets' bits. params_: fp64: least, steps, scale. scratch_: 40 · width +
    8 (buckets + 1) bytes. out: `stride` words. flags_: the bits written."""
    k = width
    ids = carray(raw_, (count * k * 4,)).view(np.int32)
    told = carray(keys_, ((count * k + 1) // 2,)).view(np.float32)
    head = carray(codes_, (2,))
    buckets, vocabulary = head[0], head[1]
    codes = carray(codes_, (2 + vocabulary + buckets,))
    params = carray(params_, (3,))
    least, steps, scale = np.float32(params[0]), np.float32(params[1]), np.float32(params[2])
    made = carray(out, (stride * 8,)).view(np.uint64)
    room = carray(scratch_, (5 * k + buckets + 1,)).view(np.int64)
    held = room[:k]
    sorted_code = room[k : 2 * k]
    sorted_level = room[2 * k : 3 * k].view(np.int32)[:k]
    levels = room[3 * k : 4 * k].view(np.int32)[:k]
    lengths = room[4 * k : 5 * k].view(np.int32)[:k]
    counts = room[5 * k :]
    at = np.int64(0)
    for place in range(count):
        row = told[place * k : (place + 1) * k]
        own = ids[place * k : (place + 1) * k]
        total = np.float32(0)
        for i in range(k):
            x = row[i]
            y = x if x > least else least
            y = y if y < np.float32(0) else np.float32(0)
            share = power(y)
            total += share
            found = np.int32(np.float32(1.5) + (y - least) * steps + share * scale)
            levels[i] = found if x > np.float32(-1e30) else np.int32(0)
        low = np.int32(1 << 30)
        for i in range(k):
            low = min(low, levels[i])
        size = np.int32(0)
        for i in range(k):
            levels[i] -= low
            size += length(levels[i] + np.int32(1))
        guess = np.int32(size // k)  # the order that takes the fewest bits is near the mean length
        best, order = np.int32(1 << 30), np.int32(0)
        for e in range(max(np.int32(0), guess - np.int32(2)), min(np.int32(14), guess + np.int32(1)) + 1):
            cost = np.int32(0)
            more = np.int32(1 << e)
            for i in range(k):
                cost += length(levels[i] + more)
            cost = np.int32(2 * cost - k * e)
            if cost < best:
                best, order = cost, np.int32(e)
        for b in range(buckets + 1):
            counts[b] = 0
        for i in range(k):
            held[i] = codes[2 + own[i]]
            counts[(held[i] >> 32) + 1] += 1
        for b in range(buckets):
            counts[b + 1] += counts[b]
        more = np.int32(1) << order
        for i in range(k):
            b = held[i] >> 32
            j = counts[b]
            counts[b] = j + 1
            sorted_code[j] = held[i]
            sorted_level[j] = levels[i] + more
        for j in range(k):
            lengths[j] = length(sorted_level[j]) - np.int32(1)
        rest = math.log(max(1.0 - total, 1e-18))
        left = np.int64(1.5 + (rest - least) * steps + math.exp(rest) * scale) if total < 1.0 else 0
        at = put(made, at, np.uint64(low) | np.uint64(order) << np.uint64(15) | np.uint64(left) << np.uint64(19), 34)
        w = at >> 6
        word = made[w]
        for j in range(k):
            here = at + j + (sorted_code[j] >> 32)
            while here >> 6 != w:
                made[w] = word
                w += 1
                word = np.uint64(0)
            word |= np.uint64(1) << np.uint64(here & 63)
        here = at + k + buckets - 1
        for j in range(k):
            here += lengths[j] - order + 1
            while here >> 6 != w:
                made[w] = word
                w += 1
                word = np.uint64(0)
            word |= np.uint64(1) << np.uint64(here & 63)
        made[w] = word
        at = here + 1
        for j in range(k):
            code = sorted_code[j]
            bits = codes[2 + vocabulary + (code >> 32)]
            n = np.int64(lengths[j])  # the level is 2ⁿ + its lower n bits
            lower = np.int64(sorted_level[j]) - (np.int64(1) << n)
            at = put(made, at, np.uint64(code & 0xFFFFFFFF) | np.uint64(lower) << np.uint64(bits), bits + n)
    carray(flags_, (1,))[0] = at


def unpack(raw_, stride, out, codes_, params_, keys_, scratch_, flags_, width, start, count):
    """raw_: `stride` words, the last ones zeros. codes_: int64: buckets, ids, levels; each bucket's bits and first
    place; by place its id. params_: fp32 (2, levels): log-probabilities and probabilities. scratch_: 8 · width bytes.
    out: ids, int32 (count, width). keys_: log-probabilities, fp32 (count, width). flags_: the bits read."""
    k = width
    words = carray(raw_, (stride * 8,)).view(np.uint64)
    head = carray(codes_, (3,))
    buckets, vocabulary, size = head[0], head[1], head[2]
    codes = carray(codes_, (3 + 2 * buckets + vocabulary,))
    tables = carray(params_, (size,)).view(np.float32)
    logs, shares = tables[:size], tables[size:]
    ids = carray(out, (count * k * 4,)).view(np.int32)
    told = carray(keys_, ((count * k + 1) // 2,)).view(np.float32)
    room = carray(scratch_, (k,)).view(np.int32)
    bucket, above = room[:k], room[k:]
    at = np.int64(0)
    for place in range(count):
        word = get(words, at)
        low = np.int64(word & np.uint64(0x7FFF))
        order = np.int64(word >> np.uint64(15) & np.uint64(15))
        left = np.int64(word >> np.uint64(19) & np.uint64(0x7FFF))
        at += 34
        w = at >> 6
        word = words[w] >> np.uint64(at & 63) << np.uint64(at & 63)
        for j in range(k):
            while word == np.uint64(0):
                w += 1
                word = words[w]
            bucket[j] = (w << 6) + lowest(word) - at - j
            word &= word - np.uint64(1)
        at += k + buckets
        w = at >> 6
        word = words[w] >> np.uint64(at & 63) << np.uint64(at & 63)
        before = at - 1
        for j in range(k):
            while word == np.uint64(0):
                w += 1
                word = words[w]
            here = (w << 6) + lowest(word)
            above[j] = here - before - 1
            before = here
            word &= word - np.uint64(1)
        at = before + 1
        total = np.float32(0)
        base = place * k
        for j in range(k):
            b = np.int64(bucket[j])
            bits = codes[3 + b]
            n = np.int64(above[j]) + order
            word = get(words, at)
            inside = np.int64(word & ((np.uint64(1) << np.uint64(bits)) - np.uint64(1)))
            lower = np.int64(word >> np.uint64(bits) & ((np.uint64(1) << np.uint64(n)) - np.uint64(1)))
            at += bits + n
            found = low + (np.int64(1) << n) + lower - (np.int64(1) << order)
            ids[base + j] = codes[3 + 2 * buckets + codes[3 + buckets + b] + inside]
            told[base + j] = logs[found]
            total += shares[found]
        # levels are rounded, what is left out is told: so the rest is what remains
        if total > np.float32(0) and shares[left] < np.float32(1):
            change = np.float32(math.log((1.0 - shares[left]) / total))
            for j in range(k):
                told[base + j] += change
    carray(flags_, (1,))[0] = at
