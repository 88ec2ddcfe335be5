"""silu(gate) * up and gelu(gate) * up; one item is a few rows.

Both are gate / (1 + exp(-t)) * up: t is the gate itself for SiLU, and for GELU
gate * (2 c + 2 c 0.044715 gate ** 2) with c = sqrt(2 / pi), because
(1 + tanh(t / 2)) / 2 = 1 / (1 + exp(-t)).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ...machine_code import ItemFunction
from .rows import read_row, write_row
from .simd import VEC_BYTES, exp2, load_i64
from .threads import Parameters, Team, item_rows
from .vectors import vec_add, vec_div, vec_fma, vec_load, vec_mul, vec_splat, vec_store

_LAYOUT = Parameters("7q")
_X, _OUT, _ROWS, _ITEM_ROWS, _WIDTH, _BF16, _GELU = range(0, 56, 8)
_LOG2E = 1.4426950408889634
_LINEAR = math.sqrt(8 / math.pi)
_CUBIC = 0.044715 * _LINEAR


def _gate_item(p: int, item: int, scratch: int) -> None:
    """Rows gate | up of twice `width` elements -> rows of `width`."""
    width, is_bf16 = load_i64(p + _WIDTH), load_i64(p + _BF16)
    is_gelu = load_i64(p + _GELU)
    size = 2 if is_bf16 else 4
    up = scratch + (width * 4 + VEC_BYTES - 1) // VEC_BYTES * VEC_BYTES
    one, minus_log2e = vec_splat(np.float32(1)), vec_splat(np.float32(-_LOG2E))
    linear, cubic = vec_splat(np.float32(_LINEAR)), vec_splat(np.float32(_CUBIC))
    first = item * load_i64(p + _ITEM_ROWS)
    for r in range(first, min(first + load_i64(p + _ITEM_ROWS), load_i64(p + _ROWS))):
        source = load_i64(p + _X) + r * 2 * width * size
        read_row(source, is_bf16, width, scratch)
        read_row(source + width * size, is_bf16, width, up)
        for at in range(0, width * 4, VEC_BYTES):
            gate = vec_load(scratch + at)
            t = gate
            if is_gelu:
                t = vec_mul(gate, vec_fma(vec_mul(gate, gate), cubic, linear))
            below = vec_add(one, exp2(vec_mul(t, minus_log2e)))
            vec_store(scratch + at, vec_mul(vec_div(gate, below), vec_load(up + at)))
        write_row(scratch, is_bf16, width, load_i64(p + _OUT) + r * width * size)


gate_item = ItemFunction(_gate_item)


def silu_mul(team: Team, gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2m] = gate | up -> silu(gate) * up [T, m]."""
    return _gated(team, gate_up, False)


def gelu_mul(team: Team, gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2m] = gate | up -> gelu(gate) * up [T, m], approximated by tanh."""
    return _gated(team, gate_up, True)


def _gated(team: Team, gate_up: torch.Tensor, is_gelu: bool) -> torch.Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    per_item, items = item_rows(rows, 4 * width, team.threads)
    team.launch(
        gate_item,
        items,
        items > 1,
        _LAYOUT,
        gate_up.data_ptr(),
        out.data_ptr(),
        rows,
        per_item,
        width,
        gate_up.dtype == torch.bfloat16,
        is_gelu,
    )
    return out
