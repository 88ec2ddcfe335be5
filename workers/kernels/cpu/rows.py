"""Rows of bfloat16 or float32 in memory, read into and written from float32.

Row-wise kernels compute in float32 in scratch memory; these are the two ends.
"""

from __future__ import annotations

from numba import njit

from .simd import narrow, pointer_f32, pointer_u16, widen


@njit(nogil=True)
def read_row(source: int, is_bf16: int, count: int, into: int) -> None:
    """`count` elements at `source` -> float32 at `into`."""
    floats = pointer_f32(into)
    if is_bf16:
        halves = pointer_u16(source)
        for i in range(count):
            floats[i] = widen(halves[i])
    else:
        singles = pointer_f32(source)
        for i in range(count):
            floats[i] = singles[i]


@njit(nogil=True)
def write_row(source: int, is_bf16: int, count: int, to: int) -> None:
    """`count` float32 at `source` -> elements at `to`, rounded to nearest."""
    floats = pointer_f32(source)
    if is_bf16:
        halves = pointer_u16(to)
        for i in range(count):
            halves[i] = narrow(floats[i])
    else:
        singles = pointer_f32(to)
        for i in range(count):
            singles[i] = floats[i]
