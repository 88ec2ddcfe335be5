"""Attention of decodes over a KV cache in 12 bits (e4m7_cache.py), in CUDA C++.

    grid  (KV heads x parts of their query heads, splits, sequences)

As decode.py: the splits of a row take equal shares of its keys, and the last to finish adds up
what they leave.  But a warp has keys, and columns of values, where the tensor cores' instruction
has 16 rows, and up to eight query heads of a KV head where it has columns.  So numbers come from
memory into the registers that they are unpacked and multiplied in, and nothing passes shared
memory but sums at the end: fewer instructions than Triton makes of it, and half the
multiplications, which is energy that linear layers get.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from pathlib import Path

import torch

from ...engine.batch import StepBatch
from ..interface import KVLayer
from .decode_tiling import WARPS_OF_PROCESSOR, DecodeTiling
from .nvrtc import CompiledKernel, available, instructions

_SOURCE = Path(__file__).with_suffix(".cu")
_HEADS = 8
"""Query heads of a program."""
_SHARED_BYTES, _SHARED_STEP = 228 << 10, 128
"""Of a multiprocessor, and what is given out at once."""
_RESERVED_BYTES = 1 << 10
"""Of shared memory, for each program."""
_CROWDED = 2
"""Programs of a multiprocessor: of more, no multiprocessor has many more than another."""


@functools.cache
def supported(device: torch.device, head_dim: int, kv_heads: int, block_size: int) -> bool:
    """Whether there is a GPU for it, and what compiles it; without, caches are unpacked.

    Raises RuntimeError where memory is what lacks.
    """
    if not available(device):
        return False
    try:
        _kernel(device, head_dim, kv_heads, block_size, warps=2, step=64, room=0)
    except (ImportError, OSError, RuntimeError, ValueError) as failure:
        if "OUT_OF_MEMORY" in str(failure):
            raise
        logging.warning("a KV cache in 12 bits is unpacked in every step: %s", failure)
        return False
    return True


def parts(per_kv_head: int) -> int:
    """Programs that share the query heads of a KV head."""
    return -(-per_kv_head // _HEADS)


def e4m7_decode(
    q: torch.Tensor,
    kv: KVLayer,
    out: torch.Tensor,
    sums: torch.Tensor,
    summary: torch.Tensor,
    counters: torch.Tensor,
    batch: StepBatch,
    decodes: int,
    splits: int,
    tiling: DecodeTiling,
    processors: int,
    scale: float,
    window: int,
) -> None:
    """The last `decodes` sequences of a batch, of one row each.

    q: [T, heads, head_dim] bfloat16; out: [T, heads * head_dim].  sums, summary: float32, for
    each sequence, KV head and split head_dim and two numbers a query head, where there are splits;
    counters: decode_tiling.COUNTERS, all zeros between launches.  processors: of the GPU.
    """
    _, heads, head_dim = q.shape
    _, kv_heads, block_size, _ = kv.keys.shape
    per_kv_head = heads // kv_heads
    grid = kv_heads * parts(per_kv_head), splits, decodes
    few = tiling.programs <= _CROWDED and math.prod(grid) <= processors * tiling.programs
    room = tiling.programs if few else 0
    warps, step = tiling.warps, tiling.step
    _kernel(q.device, head_dim, kv_heads, block_size, warps=warps, step=step, room=room).launch(
        grid,
        ctypes.c_void_p(q.data_ptr()),
        ctypes.c_void_p(kv.keys.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_void_p(sums.data_ptr()),
        ctypes.c_void_p(summary.data_ptr()),
        ctypes.c_void_p(counters.data_ptr()),
        ctypes.c_void_p(batch.query_start.data_ptr()),
        ctypes.c_void_p(batch.context_len.data_ptr()),
        ctypes.c_void_p(batch.slots.data_ptr()),
        ctypes.c_void_p(batch.block_tables.data_ptr()),
        ctypes.c_int(batch.block_tables.stride(0)),
        ctypes.c_int(len(batch.context_len) - decodes),
        ctypes.c_int(per_kv_head),
        ctypes.c_int(window),
        ctypes.c_float(scale * math.log2(math.e)),
    )


@functools.cache
def _kernel(
    device: torch.device,
    head_dim: int,
    kv_heads: int,
    block_size: int,
    *,
    warps: int,
    step: int,
    room: int,
) -> CompiledKernel:
    """On the device, which is the current one.  warps, step: of a DecodeTiling; room: see
    shared_bytes."""
    defines = {
        "HEAD_DIM": head_dim, "KV_HEADS": kv_heads, "BLOCK_SIZE": block_size, "WARPS": warps,
        "PROGRAMS": WARPS_OF_PROCESSOR[head_dim] // warps, "STEP": step,
    }  # fmt: skip
    return CompiledKernel(
        instructions() + _SOURCE.read_text(),
        [f"{name}={value}" for name, value in defines.items()],
        _SOURCE.stem, 32 * warps, shared_bytes(head_dim, warps, room), (1, 1, 1),
    )  # fmt: skip


def shared_bytes(head_dim: int, warps: int, room: int) -> int:
    """Of a program; room: more than so many programs may not share a multiprocessor, 0 for any.

    Programs come up while the kernel before still has most multiprocessors, and all would crowd
    on those that are free.
    """
    needed = 4 * warps * _HEADS * (head_dim + 8 + 2)
    if room:
        needed = max(needed, _SHARED_BYTES // (room + 1) - _RESERVED_BYTES + _SHARED_STEP)
    return needed
