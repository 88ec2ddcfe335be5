"""Philox4x32-10: a counter-based random number generator (Salmon et al., SC11).

The draw kernel (sampling/draw.py) calls it.  The same (counter, key) gives the
same four 32-bit words everywhere, so there is no generator state to keep, to
shard over ranks or to carry over a preemption.  How Albireo uses it:

    key      seed lo, seed hi                        the request's 64-bit seed
    counter  token id // 4, position lo, position hi, DOMAIN
    word     token id % 4

`position` is the index in the sequence of the token that is being chosen.
"""

from __future__ import annotations

import numpy as np
from numba import njit

DOMAIN = np.uint64(0x53414D50)
"""Fourth counter word of token draws; another use of a request's seed takes another."""

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_M0 = np.uint64(0xD2511F53)
_M1 = np.uint64(0xCD9E8D57)
_W0 = np.uint64(0x9E3779B9)
_W1 = np.uint64(0xBB67AE85)
_ROUNDS = 10


@njit(nogil=True, inline="always")
def _block(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Four words from four counter words and two key words, all uint64 below 2**32."""
    for _ in range(_ROUNDS):
        p0 = c0 * _M0
        p1 = c2 * _M1
        c0 = (p1 >> _SHIFT) ^ c1 ^ k0
        c1 = p1 & _LOW
        c2 = (p0 >> _SHIFT) ^ c3 ^ k1
        c3 = p0 & _LOW
        k0 = (k0 + _W0) & _LOW
        k1 = (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@njit(nogil=True)
def philox4x32(counter, key):  # type: ignore[no-untyped-def]
    """Four words (uint64 tuple) from counter [4] and key [2], uint64 arrays of 32-bit words."""
    return _block(counter[0], counter[1], counter[2], counter[3], key[0], key[1])


@njit(nogil=True)
def token_words(seed, position, first_token, out):  # type: ignore[no-untyped-def]
    """Fills out [n] (uint32) with the words of tokens first_token .. first_token + n - 1.

    seed: uint64; position: int64.  n and first_token are multiples of 4.
    """
    k0 = seed & _LOW
    k1 = seed >> _SHIFT
    c1 = np.uint64(position) & _LOW
    c2 = np.uint64(position) >> _SHIFT
    first = np.uint64(first_token // 4)
    for i in range(len(out) // 4):
        w0, w1, w2, w3 = _block(first + np.uint64(i), c1, c2, DOMAIN, k0, k1)
        out[4 * i] = w0
        out[4 * i + 1] = w1
        out[4 * i + 2] = w2
        out[4 * i + 3] = w3
