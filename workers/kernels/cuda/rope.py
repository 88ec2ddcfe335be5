"""After the qkv projection: head norms, rotary embedding, and the write into the KV cache.

A program takes some heads of one token: widened to float32, normalised where
the model asks for it, rotated, rounded once and written, queries to the
result, keys and values to their place in the cache (see paging.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...engine.batch import StepBatch
from ..interface import KVLayer
from .e4m7_cache import store
from .overlap import come_up, overlapped, wait
from .paging import in_head, padded

_HEADS_A_PROGRAM = 8


@triton.jit
def _normalised(low, high, low_weight, high_weight, eps, HALF: tl.constexpr):
    """Heads, each half of HALF columns and zeros, over their mean square, times the weights."""
    total = tl.sum(low * low, 1) + tl.sum(high * high, 1)
    scale = (1.0 / tl.sqrt(total / (2 * HALF) + eps))[:, None]
    return low * scale * low_weight[None, :], high * scale * high_weight[None, :]


@triton.jit
def _half(at, i, HALF: tl.constexpr, WIDTH: tl.constexpr):
    """HALF numbers, and zeros up to WIDTH."""
    if WIDTH > HALF:
        found = tl.load(at + i, mask=i < HALF, other=0.0)
    else:
        found = tl.load(at + i)
    return found


@triton.jit
def _write(target, place, i, low, high, mask, HALF: tl.constexpr, WIDTH: tl.constexpr):
    """Both halves of heads, rounded to the target's dtype."""
    dtype = target.dtype.element_ty
    here = in_head(mask[:, None], i, HALF, WIDTH)
    tl.store(target + place[:, None] + i[None, :], low.to(dtype), mask=here)
    tl.store(target + place[:, None] + HALF + i[None, :], high.to(dtype), mask=here)


@triton.jit(do_not_specialize_on_alignment=["positions", "kv_index"])
def _rope_and_cache(
    qkv, out, keys, values, q_norm, k_norm, rope, positions, kv_index, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, NORM: tl.constexpr, SOME: tl.constexpr, WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr, E4M7: tl.constexpr,
):  # fmt: skip
    """WIDTH: of a tile that holds half a head.  E4M7: the cache has 12 bits a number."""
    come_up(OVERLAP)
    HALF: tl.constexpr = HEAD_DIM // 2
    TOTAL: tl.constexpr = HEADS + 2 * KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * SOME + tl.arange(0, SOME)
    i = tl.arange(0, WIDTH)
    is_q, is_v = head < HEADS, (head >= HEADS + KV_HEADS) & (head < TOTAL)
    is_k = (head >= HEADS) & (head < HEADS + KV_HEADS)

    wait(OVERLAP)
    source = qkv + (token * TOTAL + head)[:, None] * HEAD_DIM + i[None, :]
    here = in_head((head < TOTAL)[:, None], i, HALF, WIDTH)
    low = tl.load(source, mask=here, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=here, other=0.0).to(tl.float32)
    angles = rope + tl.load(positions + token).to(tl.int64) * HEAD_DIM
    cos = _half(angles, i, HALF, WIDTH)[None, :]
    sin = _half(angles + HALF, i, HALF, WIDTH)[None, :]
    place = tl.load(kv_index + token).to(tl.int64)

    low_in, high_in = low, high
    if NORM:
        q_low, q_high = _normalised(
            low, high, _half(q_norm, i, HALF, WIDTH), _half(q_norm + HALF, i, HALF, WIDTH),
            eps, HALF,
        )  # fmt: skip
        k_low, k_high = _normalised(
            low, high, _half(k_norm, i, HALF, WIDTH), _half(k_norm + HALF, i, HALF, WIDTH),
            eps, HALF,
        )  # fmt: skip
        low = tl.where(is_q[:, None], q_low, k_low)
        high = tl.where(is_q[:, None], q_high, k_high)
    turned_low = low * cos - high * sin
    turned_high = high * cos + low * sin

    block, offset = place // BLOCK_SIZE, place % BLOCK_SIZE
    kv_head = tl.where(is_v, head - HEADS - KV_HEADS, head - HEADS)
    _write(out, (token * HEADS + head) * HEAD_DIM, i, turned_low, turned_high, is_q, HALF, WIDTH)
    if E4M7:
        if tl.program_id(1) * SOME + SOME > HEADS:  # Most programs have only queries.
            row = kv_head * BLOCK_SIZE + offset
            low = tl.where(is_v[:, None], low_in, turned_low)
            high = tl.where(is_v[:, None], high_in, turned_high)
            store(keys, block, row, is_v, i, low, high, is_k | is_v, KV_HEADS, BLOCK_SIZE, HALF)
    else:
        cached = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + offset) * HEAD_DIM
        _write(keys, cached, i, turned_low, turned_high, is_k, HALF, WIDTH)
        _write(values, cached, i, low_in, high_in, is_v, HALF, WIDTH)


def rope_and_cache(
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
    """See Kernels.rope_and_cache; the model gives both head norms or none."""
    rows = qkv.shape[0]
    out = qkv.new_empty(rows, heads, head_dim)
    if rows:
        _rope_and_cache[(rows, triton.cdiv(heads + 2 * kv_heads, _HEADS_A_PROGRAM))](
            qkv,
            out,
            kv.keys,
            kv.values,
            qkv if q_norm is None else q_norm,
            qkv if k_norm is None else k_norm,
            rope,
            batch.positions,
            batch.kv_index,
            eps,
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_SIZE=kv.keys.shape[2],
            NORM=q_norm is not None and k_norm is not None,
            SOME=_HEADS_A_PROGRAM,
            WIDTH=padded(head_dim // 2),
            E4M7=kv.keys.dtype == torch.uint8,
            num_warps=2,
            **overlapped(qkv.device),
        )
    return out
