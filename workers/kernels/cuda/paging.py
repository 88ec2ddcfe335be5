"""Memory layout of the paged KV cache on the GPU, for those who write it and those who read it.

    keys, values   [num_blocks, kv_heads, block_size, head_dim]

So the tokens of a block that one KV head owns are one piece of memory (4 KB
for 16 tokens of 128 bfloat16), and attention loads tiles of several blocks
row by row, 16 bytes a thread.
"""

from __future__ import annotations

import torch

from ..interface import KVLayer

_MIN_HEAD_DIM, _MAX_HEAD_DIM = 16, 256


def check_shape(block_size: int, head_dim: int) -> None:
    """Raises ValueError for what the kernels cannot page."""
    if block_size < 16 or block_size % 16:
        raise ValueError(
            f"KV blocks of {block_size} tokens: the CUDA kernels need a multiple of 16"
        )
    if head_dim & (head_dim - 1) or not _MIN_HEAD_DIM <= head_dim <= _MAX_HEAD_DIM:
        raise ValueError(
            f"head size {head_dim}: the CUDA kernels take powers of two "
            f"from {_MIN_HEAD_DIM} to {_MAX_HEAD_DIM}"
        )


def new_kv_layer(
    num_blocks: int,
    block_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVLayer:
    """An empty cache of one layer."""
    check_shape(block_size, head_dim)
    shape = (num_blocks, kv_heads, block_size, head_dim)
    return KVLayer(
        torch.zeros(shape, dtype=dtype, device=device),
        torch.zeros(shape, dtype=dtype, device=device),
    )
