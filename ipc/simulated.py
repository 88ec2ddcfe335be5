"""The tokens of the `sim` device: a formula that whoever receives them can check.

Token k of a sequence (0-based position, prompt included) depends on the
request's seed and k alone.  The `sim` engine computes it for whole arrays,
the bench clients for single tokens.
"""

from __future__ import annotations

MIX_SEED = 0x9E3779B1
MIX_POSITION = 0x85EBCA6B
MIX_OUT = 0x2C1B3C6D


def sim_token(seed: int, position: int, vocab_size: int) -> int:
    """The token at `position`, in 0 .. vocab_size - 1; all arithmetic modulo 2**32."""
    x = (seed * MIX_SEED + position * MIX_POSITION) & 0xFFFFFFFF
    x ^= x >> 15
    x = (x * MIX_OUT) & 0xFFFFFFFF
    return (x >> 8) % vocab_size
