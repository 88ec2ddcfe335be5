"""Memory layout of the paged KV cache, for those who write it and those who read it.

A block is cut into groups of 16 tokens, the lanes of a vector:

    keys    bfloat16 [blocks, kv_heads, groups, head_dim/2, 16, 2]    pairs of one key's elements
            float32  [blocks, kv_heads, groups, head_dim, 16]
    values  bfloat16 [blocks, kv_heads, groups, 8, padded, 2]         pairs of two tokens
            float32  [blocks, kv_heads, groups, 16, padded]

`padded` is head_dim rounded up to 16; the padding stays zero.  These are the
operands of products.py: scores take keys 16 at a time as columns, the
weighted sum takes values with head_dim as columns and tokens as steps.
"""

from __future__ import annotations

import numpy as np
import torch

from ..interface import KVLayer, Zeros
from .simd import LANES

MAX_HEAD_DIM = 256
"""What a thread's scratch memory is laid out for."""


def padded_head_dim(head_dim: int) -> int:
    """Columns of a value, in whole vectors."""
    return -(-head_dim // LANES) * LANES


def check_shape(block_size: int, head_dim: int, dtype: torch.dtype) -> None:
    """Raises ValueError for what the kernels cannot page."""
    if block_size < LANES or block_size % LANES:
        raise ValueError(
            f"KV blocks of {block_size} tokens: the CPU kernels need a multiple of {LANES}"
        )
    if head_dim < 2 or head_dim > MAX_HEAD_DIM or head_dim % 2:
        raise ValueError(
            f"head size {head_dim}: the CPU kernels take even sizes of 2 to {MAX_HEAD_DIM}"
        )


def new_kv_layer(
    num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype,
    zeros: Zeros | None = None,
) -> KVLayer:  # fmt: skip
    """An empty cache of one layer; memory is taken from the system as it is written."""
    zeros = zeros or _untouched
    check_shape(block_size, head_dim, dtype)
    lead = (num_blocks, kv_heads, block_size // LANES)
    width = padded_head_dim(head_dim)
    if dtype == torch.bfloat16:
        keys = zeros((*lead, head_dim // 2, LANES, 2), dtype)
        values = zeros((*lead, LANES // 2, width, 2), dtype)
    else:
        keys = zeros((*lead, head_dim, LANES), dtype)
        values = zeros((*lead, LANES, width), dtype)
    return KVLayer(keys, values)


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take no memory yet: numpy's come from the system's zero page, torch's do not."""
    width = np.int16 if dtype == torch.bfloat16 else np.int32
    return torch.from_numpy(np.zeros(shape, width)).view(dtype)
