"""Memory layout of the paged KV cache on the GPU, for those who write it and those who read it.

    keys, values   [num_blocks, kv_heads, block_size, head_dim]

So the tokens of a block that one KV head owns are one piece of memory (4 KB
for 16 tokens of 128 bfloat16), and attention loads tiles of several blocks
row by row, 16 bytes a thread.  A tile is a power of two wide (`padded`); where
head_dim is none, what is beyond it is masked: neither loaded nor stored.

With 12 bits a number (e4m7_cache.py) one tensor of bytes is both, the last size is
3 head_dim + 4, and a block's memory is in another order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..interface import KVLayer, Zeros
from .needs import E4M7_HEAD_DIMS

_MIN_HEAD_DIM, _MAX_HEAD_DIM = 16, 256
_HEAD_DIM_STEP = 16
"""So that a row of a cache, and each half of it, begins where 16 bytes can be loaded at once."""


def check_shape(block_size: int, head_dim: int) -> None:
    """Raises ValueError for what the kernels cannot page."""
    if block_size < 16 or block_size % 16:
        raise ValueError(
            f"KV blocks of {block_size} tokens: the CUDA kernels need a multiple of 16"
        )
    if head_dim % _HEAD_DIM_STEP or not _MIN_HEAD_DIM <= head_dim <= _MAX_HEAD_DIM:
        raise ValueError(
            f"head size {head_dim}: the CUDA kernels take multiples of {_HEAD_DIM_STEP} "
            f"from {_MIN_HEAD_DIM} to {_MAX_HEAD_DIM}"
        )


def padded(head_dim: int) -> int:
    """The width of a tile that holds a head."""
    width: int = triton.next_power_of_2(head_dim)
    return width


@triton.jit
def in_head(rows, column, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The mask of a tile: `rows` [n, 1], less what is beyond the head. Whole heads cost nothing."""
    if WIDTH > HEAD_DIM:
        rows = rows & (column < HEAD_DIM)[None, :]
    return rows


def new_kv_layer(
    num_blocks: int,
    block_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    zeros: Zeros,
    e4m7: bool = False,
) -> KVLayer:
    """An empty cache of one layer."""
    check_shape(block_size, head_dim)
    shape = (num_blocks, kv_heads, block_size, head_dim)
    if e4m7:
        if head_dim not in E4M7_HEAD_DIMS:
            raise ValueError(f"head size {head_dim}: a KV cache in 12 bits takes {E4M7_HEAD_DIMS}")
        both = zeros((*shape[:-1], 3 * head_dim + 4), torch.uint8)
        return KVLayer(both, both)
    return KVLayer(zeros(shape, dtype), zeros(shape, dtype))
