"""After the qkv projection: head norms, rotary embedding, and the write into the KV cache.

One item is a few rows.  A head is widened to float32, normalised where the
model asks for it, rotated, rounded once, and written: queries to the result,
keys and values to their place in the cache (see paging.py).
"""

from __future__ import annotations

import torch
from numba import njit

from ...engine.batch import StepBatch
from ...machine_code import ItemFunction
from ..interface import KVLayer
from .norm import normalise
from .rows import read_row, write_row
from .simd import LANES, load_f64, load_i64, narrow, pointer_f32, pointer_i32, pointer_u16
from .threads import Parameters, Team, item_rows

_LAYOUT = Parameters("16qd")
(
    _QKV, _OUT, _KEYS, _VALUES, _Q_NORM, _K_NORM, _ROPE, _POSITIONS, _KV_INDEX,
    _ROWS, _ITEM_ROWS, _HEADS, _KV_HEADS, _HEAD_DIM, _GROUPS, _BF16, _EPS,
) = range(0, 136, 8)  # fmt: skip


@njit(nogil=True, fastmath={"contract"})
def _rotate(head: int, angles: int, head_dim: int) -> None:
    """Rotates the halves of a float32 head in place; angles: cos | sin."""
    half = head_dim // 2
    low, high = pointer_f32(head), pointer_f32(head + 4 * half)
    cos, sin = pointer_f32(angles), pointer_f32(angles + 4 * half)
    for i in range(half):
        a, b = low[i], high[i]
        low[i] = a * cos[i] - b * sin[i]
        high[i] = b * cos[i] + a * sin[i]


@njit(nogil=True)
def _write_key(head: int, is_bf16: int, head_dim: int, group: int, lane: int) -> None:
    """A float32 head to its lane of a group of keys."""
    source = pointer_f32(head)
    if is_bf16:
        halves = pointer_u16(group + 4 * lane)
        for i in range(head_dim // 2):
            halves[2 * LANES * i] = narrow(source[2 * i])
            halves[2 * LANES * i + 1] = narrow(source[2 * i + 1])
    else:
        singles = pointer_f32(group + 4 * lane)
        for i in range(head_dim):
            singles[LANES * i] = source[i]


@njit(nogil=True)
def _write_value(source: int, is_bf16: int, head_dim: int, group: int, lane: int) -> None:
    """A head, as it is in qkv, to its row of a group of values."""
    padded = (head_dim + LANES - 1) // LANES * LANES
    if is_bf16:
        halves = pointer_u16(source)
        to = pointer_u16(group + (lane // 2) * padded * 4 + (lane % 2) * 2)
        for i in range(head_dim):
            to[2 * i] = halves[i]
    else:
        singles = pointer_f32(source)
        row = pointer_f32(group + lane * padded * 4)
        for i in range(head_dim):
            row[i] = singles[i]


def _rope_item(p: int, item: int, scratch: int) -> None:
    """Rows of q | k | v."""
    heads, kv_heads = load_i64(p + _HEADS), load_i64(p + _KV_HEADS)
    head_dim, groups, is_bf16 = load_i64(p + _HEAD_DIM), load_i64(p + _GROUPS), load_i64(p + _BF16)
    head_bytes = head_dim * (2 if is_bf16 else 4)
    padded = (head_dim + LANES - 1) // LANES * LANES
    key_bytes = LANES * head_bytes
    value_bytes = LANES * padded * (2 if is_bf16 else 4)
    q_norm, k_norm, head = load_i64(p + _Q_NORM), load_i64(p + _K_NORM), scratch
    positions = pointer_i32(load_i64(p + _POSITIONS))
    kv_index = pointer_i32(load_i64(p + _KV_INDEX))
    first = item * load_i64(p + _ITEM_ROWS)
    for row in range(first, min(first + load_i64(p + _ITEM_ROWS), load_i64(p + _ROWS))):
        source = load_i64(p + _QKV) + row * (heads + 2 * kv_heads) * head_bytes
        out = load_i64(p + _OUT) + row * heads * head_bytes
        angles = load_i64(p + _ROPE) + positions[row] * head_dim * 4
        place = kv_index[row]
        block, offset = place // (groups * LANES), place % (groups * LANES)
        for h in range(heads + kv_heads):
            read_row(source + h * head_bytes, is_bf16, head_dim, head)
            if h < heads and q_norm:
                normalise(head, q_norm, head_dim, load_f64(p + _EPS))
            if h >= heads and k_norm:
                normalise(head, k_norm, head_dim, load_f64(p + _EPS))
            _rotate(head, angles, head_dim)
            if h < heads:
                write_row(head, is_bf16, head_dim, out + h * head_bytes)
            else:
                group = (block * kv_heads + h - heads) * groups + offset // LANES
                address = load_i64(p + _KEYS) + group * key_bytes
                _write_key(head, is_bf16, head_dim, address, offset % LANES)
        for h in range(kv_heads):
            group = (block * kv_heads + h) * groups + offset // LANES
            address = load_i64(p + _VALUES) + group * value_bytes
            value = source + (heads + kv_heads + h) * head_bytes
            _write_value(value, is_bf16, head_dim, address, offset % LANES)


rope_item = ItemFunction(_rope_item)


def rope_and_cache(
    team: Team,
    qkv: torch.Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    rope: torch.Tensor,
    batch: StepBatch,
    kv: KVLayer,
) -> torch.Tensor:
    """See Kernels.rope_and_cache."""
    rows = qkv.shape[0]
    out = qkv.new_empty(rows, heads, head_dim)
    per_item, items = item_rows(rows, qkv.shape[1], team.threads)
    team.launch(
        rope_item,
        items,
        items > 1,
        _LAYOUT,
        qkv.data_ptr(),
        out.data_ptr(),
        kv.keys.data_ptr(),
        kv.values.data_ptr(),
        0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(),
        rope.data_ptr(),
        batch.positions.data_ptr(),
        batch.kv_index.data_ptr(),
        rows,
        per_item,
        heads,
        kv_heads,
        head_dim,
        kv.keys.shape[2],
        qkv.dtype == torch.bfloat16,
        eps,
    )
    return out
