"""RMSNorm, alone and around a residual addition; one item is a few rows."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit

from ...machine_code import ItemFunction
from .rows import read_row, write_row
from .simd import load_f64, load_i64, pointer_f32
from .threads import Parameters, Team, item_rows

_LAYOUT = Parameters("9qd")
_X, _RESIDUAL, _INNER, _WEIGHT, _OUT, _ROWS, _ITEM_ROWS, _WIDTH, _BF16, _EPS = range(0, 80, 8)


@njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})
def normalise(row: int, weight: int, width: int, eps: float) -> None:
    """float32 row *= weight / sqrt(mean(row ** 2) + eps), in place."""
    x, w = pointer_f32(row), pointer_f32(weight)
    total = np.float32(0)
    for i in range(width):
        total += x[i] * x[i]
    scale = np.float32(1.0 / math.sqrt(total / width + eps))
    for i in range(width):
        x[i] = x[i] * scale * w[i]


def _norm_item(p: int, item: int, scratch: int) -> None:
    """residual += x where there is a residual, rounded as it is stored; then its norm.

    x is normalised before where there is an inner weight, and rounded as well.
    """
    width, is_bf16 = load_i64(p + _WIDTH), load_i64(p + _BF16)
    row_bytes = width * (2 if is_bf16 else 4)
    residual, inner, eps = load_i64(p + _RESIDUAL), load_i64(p + _INNER), load_f64(p + _EPS)
    weight, row, other = load_i64(p + _WEIGHT), scratch, scratch + 4 * width
    first = item * load_i64(p + _ITEM_ROWS)
    for r in range(first, min(first + load_i64(p + _ITEM_ROWS), load_i64(p + _ROWS))):
        read_row(load_i64(p + _X) + r * row_bytes, is_bf16, width, row)
        if inner:
            normalise(row, inner, width, eps)
            write_row(row, is_bf16, width, other)
            read_row(other, is_bf16, width, row)
        if residual:
            read_row(residual + r * row_bytes, is_bf16, width, other)
            a, b = pointer_f32(row), pointer_f32(other)
            for i in range(width):
                a[i] += b[i]
            write_row(row, is_bf16, width, residual + r * row_bytes)
            read_row(residual + r * row_bytes, is_bf16, width, row)
        normalise(row, weight, width, eps)
        write_row(row, is_bf16, width, load_i64(p + _OUT) + r * row_bytes)


norm_item = ItemFunction(_norm_item)


def rms_norm(
    team: Team,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    inner: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, hidden] -> [T, hidden]; adds x to `residual` first, in place, where given.

    inner: weight of a norm of x before.
    """
    rows, width = x.shape
    out = x.new_empty(rows, width)
    per_item, items = item_rows(rows, width, team.threads)
    team.launch(
        norm_item,
        items,
        items > 1,
        _LAYOUT,
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if inner is None else inner.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        rows,
        per_item,
        width,
        x.dtype == torch.bfloat16,
        eps,
    )
    return out
