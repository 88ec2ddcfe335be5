"""Which tokens of a row may be drawn: top-k, top-p and min-p as one threshold on its logits.

The row kernel (sampling/draw.py) calls `scan_row` and then `keep_threshold`
on a row z of float32 logits.  The filters apply one after the other, as
Hugging Face applies them:

    temperature  s = (z - max z) / temperature, in float64: nothing can overflow
    top-k        the k best tokens, and all that tie with the k-th
    top-p        of the softmax of what top-k kept, the smallest set of best
                 tokens whose mass reaches top_p, and all that tie with its last
    min-p        tokens with at least min_p times the best one's probability

Each keeps all tokens from some logit upwards, so the kept set is {z >= t} for
one t, and order and sharding of the vocabulary cannot matter.  Mass is summed
in integers (exp(s) in units of 2**-42), so the order of a sum cannot move the
boundary either.  Nothing sorts: a histogram and a quickselect find a t.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

BLOCK = 64
"""Tokens that share one maximum in `scan_row`; a block below the threshold is never read."""

BUCKETS = 512
MASS_BITS = 42
NEGLIGIBLE = -30.0
"""Scaled logits below this weigh nothing: exp(-30) < 2**-43."""

LOWEST_FINITE = np.float64(np.finfo(np.float32).min)

SOUND, EMPTY, BROKEN = 0, 1, 2
"""What a row, or a shard of one, can be: EMPTY has nothing but -inf, BROKEN has a NaN or a +inf."""

_SIGN = np.int32(31)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_LOWEST = np.int32(-(2**31))
_KEY_INF = np.int32(0x7F800000)
_KEY_MINUS_INF = np.int32(-0x7F800001)
_LOG2_E = 1.4426950408889634
_LN2_HIGH = 6.93147180369123816490e-01
_LN2_LOW = 1.90821492927058770002e-10
_SELECT_DIRECTLY = 256


@njit(nogil=True, inline="always")
def _ordered(bits):  # type: ignore[no-untyped-def]
    """A float32's bits as an int32 of the same order, and the reverse (it is its own inverse)."""
    return np.int32(bits ^ np.int32(np.int32(bits >> _SIGN) & _MAGNITUDE))


@njit(nogil=True)
def scan_row(row, block_max):  # type: ignore[no-untyped-def]
    """Fills block_max [ceil(V / BLOCK)] (float32) with the maxima of the blocks of row [V].

    Returns SOUND, EMPTY or BROKEN.  Integers of the same order stand for the
    floats, so that a NaN cannot hide.
    """
    bits = row.view(np.int32)
    max_bits = block_max.view(np.int32)
    lowest = _MAGNITUDE
    highest = _LOWEST
    whole = len(row) // BLOCK
    for block in range(whole):
        high = _LOWEST
        low = _MAGNITUDE
        for i in range(BLOCK):
            key = _ordered(bits[block * BLOCK + i])
            high = max(high, key)
            low = min(low, key)
        max_bits[block] = _ordered(high)
        highest = max(highest, high)
        lowest = min(lowest, low)
    if whole * BLOCK < len(row):
        high = _LOWEST
        for i in range(whole * BLOCK, len(row)):
            key = _ordered(bits[i])
            high = max(high, key)
            lowest = min(lowest, key)
        max_bits[whole] = _ordered(high)
        highest = max(highest, high)
    if highest >= _KEY_INF or lowest < _KEY_MINUS_INF:
        return BROKEN
    return SOUND if highest > _KEY_MINUS_INF else EMPTY


@njit(nogil=True)
def first_best(row, block_max):  # type: ignore[no-untyped-def]
    """The lowest token id with the best logit of a row that is not BROKEN."""
    best = block_max[0]
    at = 0
    for block in range(1, len(block_max)):
        if block_max[block] > best:
            best = block_max[block]
            at = block
    token = at * BLOCK
    while row[token] != best:
        token += 1
    return token


@njit(nogil=True, inline="always")
def token_mass(scaled):  # type: ignore[no-untyped-def]
    """exp(scaled) in units of 2**-MASS_BITS, rounded down, for scaled in [NEGLIGIBLE, 0].

    Plain arithmetic, so that every lane of a vector gives what a scalar gives.
    """
    doublings = np.int64(scaled * _LOG2_E - 0.5)
    r = scaled - doublings * _LN2_HIGH - doublings * _LN2_LOW
    e = 1.0 / 479001600.0
    e = e * r + 1.0 / 39916800.0
    e = e * r + 1.0 / 3628800.0
    e = e * r + 1.0 / 362880.0
    e = e * r + 1.0 / 40320.0
    e = e * r + 1.0 / 5040.0
    e = e * r + 1.0 / 720.0
    e = e * r + 1.0 / 120.0
    e = e * r + 1.0 / 24.0
    e = e * r + 1.0 / 6.0
    e = e * r + 0.5
    e = e * r + 1.0
    e = e * r + 1.0
    return np.int64(e * 2.0**60) >> (np.int64(60 - MASS_BITS) - doublings)


@njit(nogil=True)
def gather(row, block_max, low, values):  # type: ignore[no-untyped-def]
    """Copies the logits >= low (float64) of row into values; returns how many."""
    count = 0
    for block in range(len(block_max)):
        if block_max[block] >= low:
            for i in range(block * BLOCK, min((block + 1) * BLOCK, len(row))):
                values[count] = row[i]
                count += row[i] >= low
    return count


@njit(nogil=True)
def _reach_directly(values, weights, count, target):  # type: ignore[no-untyped-def]
    """The largest v of values[:count] with sum(weights where value >= v) >= target: quickselect.

    Permutes both arrays.  The sum of all weights is at least target.
    """
    start, end = 0, count
    while True:
        a, b, c = values[start], values[(start + end) // 2], values[end - 1]
        pivot = max(min(a, b), min(max(a, b), c))
        # Three-way partition: [start, above) > pivot, [above, at) == pivot, [below, end) < pivot.
        above, at, below = start, start, end
        mass_above = np.int64(0)
        mass_equal = np.int64(0)
        while at < below:
            value = values[at]
            weight = weights[at]
            if value > pivot:
                mass_above += weight
                values[at], weights[at] = values[above], weights[above]
                values[above], weights[above] = value, weight
                above += 1
                at += 1
            elif value < pivot:
                below -= 1
                values[at], weights[at] = values[below], weights[below]
                values[below], weights[below] = value, weight
            else:
                mass_equal += weight
                at += 1
        if mass_above >= target:
            end = above
        elif mass_above + mass_equal >= target or below == end:
            return pivot
        else:
            target -= mass_above + mass_equal
            start = below


@njit(nogil=True)
def _span(values):  # type: ignore[no-untyped-def]
    """The lowest and the highest of values (float32, no NaN), as float64."""
    ends = np.empty(2, np.float32)
    bits = values.view(np.int32)
    low, high = _MAGNITUDE, _LOWEST
    for i in range(len(bits)):
        key = _ordered(bits[i])
        low = min(low, key)
        high = max(high, key)
    end_bits = ends.view(np.int32)
    end_bits[0] = _ordered(low)
    end_bits[1] = _ordered(high)
    return np.float64(ends[0]), np.float64(ends[1])


@njit(nogil=True)
def reach(values, weights, count, target, histogram):  # type: ignore[no-untyped-def]
    """As `_reach_directly`; narrows many values down to one bucket of a histogram first."""
    if count <= _SELECT_DIRECTLY:
        return _reach_directly(values, weights, count, target)
    low, high = _span(values[:count])
    if high == low:
        return values[0]
    # Buckets grow as values fall; scale and rounding keep that order.
    scale = (BUCKETS - 1) / (high - low)
    histogram[:] = 0
    for i in range(count):
        histogram[np.int64((high - values[i]) * scale)] += weights[i]
    bucket = 0
    while bucket < BUCKETS - 1 and histogram[bucket] < target:
        target -= histogram[bucket]
        bucket += 1
    inside = 0
    for i in range(count):
        value = values[i]
        if np.int64((high - value) * scale) == bucket:
            values[inside] = value
            weights[inside] = weights[i]
            inside += 1
    return _reach_directly(values, weights, inside, target)


@njit(nogil=True)
def kth_best(row, block_max, k, values, weights, histogram):  # type: ignore[no-untyped-def]
    """The k-th best logit of the row, or a bound below all finite ones where they are fewer."""
    low = LOWEST_FINITE
    blocks = 0
    for maximum in block_max:
        values[blocks] = maximum
        blocks += maximum >= low
    if k < blocks:
        # k blocks reach the k-th best of the maxima, so the k-th best logit is no lower.
        weights[:blocks] = 1
        low = np.float64(reach(values, weights, blocks, np.int64(k), histogram))
    count = gather(row, block_max, low, values)
    if count <= k:
        return low
    weights[:count] = 1
    return np.float64(reach(values, weights, count, np.int64(k), histogram))


@njit(nogil=True)
def keep_threshold(  # type: ignore[no-untyped-def]
    row, block_max, best, temperature, top_k, top_p, min_p, values, weights, histogram
):
    """The logit t (float64) such that the filters keep the tokens with z >= t.

    row: [V] float32, SOUND to `scan_row`, which filled block_max; best: its
    best logit.  temperature > 0; top_k 0, top_p 1 and min_p 0 are off.
    values [V] float32, weights [V] int64, histogram [BUCKETS] int64: scratch.
    Tokens with logit -inf are never kept.
    """
    threshold = LOWEST_FINITE
    if 0 < top_k < len(row):
        threshold = kth_best(row, block_max, top_k, values, weights, histogram)
    if top_p < 1.0:
        low = max(threshold, best + NEGLIGIBLE * temperature)
        count = gather(row, block_max, low, values)
        inverse = 1.0 / temperature
        total = np.int64(0)
        for i in range(count):
            weight = token_mass(max((values[i] - best) * inverse, NEGLIGIBLE))
            weights[i] = weight
            total += weight
        target = max(np.int64(math.ceil(np.float64(top_p) * total)), np.int64(1))
        threshold = max(threshold, np.float64(reach(values, weights, count, target, histogram)))
    if min_p > 0.0:
        threshold = max(threshold, best + temperature * math.log(np.float64(min_p)))
    return threshold
