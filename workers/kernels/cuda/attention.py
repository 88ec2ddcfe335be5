"""Causal attention over the paged cache: chunks by one kernel, decodes by another.

Both launches follow from plain ints and shapes (rows, sequences, chunks,
width of the block tables), so a captured launch serves any lengths, and any
smaller step, padded as StepBatch says.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from ...engine.batch import StepBatch
from ..interface import KVLayer
from .decode import decode
from .overlap import overlapped
from .paging import padded
from .prefill import prefill
from .widen import widen

_MAX_SPLITS = 64
_COUNTERS = 4096
"""Rows x KV heads that can be shared out among programs."""
_INTERPRETED_PROCESSORS = 16
_FEW_ROW_HEADS = 256
"""Two for each multiprocessor of an H100, which more programs share than fit at once."""
_MANY_ROW_HEADS = 1024
"""So many that no keys of a row need to be shared out."""


class DecodeTiling(NamedTuple):
    """How the keys of decodes are cut up.

    keys: of one round of a program.  step: a program's share is a multiple of it.
    programs: for each multiprocessor, so that enough loads are in flight.
    """

    keys: int
    step: int
    programs: int
    warps: int
    stages: int


def decode_tiling(width: int, dtype: torch.dtype, row_heads: int) -> DecodeTiling:
    """How decodes are cut up; width: of a head's tile.  dtype: of the cache.  row_heads: decodes
    x KV heads.

    Many: rounds of 16 KB of keys, and as much of values.  Few, where every
    program has only some rounds and latency decides: half of that, a round more on
    its way, for half the warps, and all programs at once.  Measured on an H100 (tools/
    gpu_kernel_bench.py --tune; head size 128, context 320, 4 KV heads) at 4, 64 and 256
    sequences x heads: 5.7 us, 9.7 and 19.0, where rounds of 16 KB take 25.3 for 256.
    A cache of 12 bits has rounds of half as many bytes for two warps; with 8 KV heads and 64, 128
    and 256 sequences it takes 28.3 us, 49.5 and 94.6, where bfloat16 takes 32.5, 61.3 and 117.4.
    """
    few = row_heads <= _FEW_ROW_HEADS
    if dtype == torch.uint8:
        keys = max(min(8192 // width, 64), 32)
        if few:
            return DecodeTiling(keys, step=64, programs=2, warps=2, stages=3)
        if row_heads < _MANY_ROW_HEADS:
            return DecodeTiling(keys, step=32, programs=4, warps=2, stages=3)
        return DecodeTiling(keys=32, step=32, programs=4, warps=2, stages=2)
    keys = min(max(16384 // (width * dtype.itemsize), 16), 128)
    if few:
        return DecodeTiling(keys=max(keys // 2, 16), step=64, programs=2, warps=2, stages=3)
    return DecodeTiling(keys=keys, step=32, programs=4, warps=4, stages=2)


class Attention:
    """See Kernels.attention.

    batch_invariant: decodes go the way of chunks, whose rows do not depend on
    the batch; split decodes do, by the number of splits.
    """

    def __init__(self, batch_invariant: bool) -> None:
        self._batch_invariant = batch_invariant
        self._processors = 0
        self._counters: torch.Tensor | None = None

    def prepare(self, device: torch.device) -> None:
        """Makes what launches share: outside of a capture, before the first call."""
        if self._counters is not None:
            return
        self._processors = _INTERPRETED_PROCESSORS
        if device.type == "cuda":
            self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._counters = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)

    def __call__(
        self, q: torch.Tensor, kv: KVLayer, batch: StepBatch, scale: float, window: int
    ) -> torch.Tensor:
        rows, heads, head_dim = q.shape
        out = q.new_empty(rows, heads * head_dim)
        sequences = len(batch.context_len)
        chunks = sequences if self._batch_invariant else batch.num_chunks
        decodes = sequences - chunks
        if chunks:
            if kv.wide is not None:
                widen(kv, kv.wide, batch, chunks, window, self._processors)
            _prefill(q, out, kv.wide or kv, batch, chunks, scale, window)
        if decodes:
            self._decode(q, out, kv, batch, decodes, scale, window)
        return out

    def _decode(
        self,
        q: torch.Tensor,
        out: torch.Tensor,
        kv: KVLayer,
        batch: StepBatch,
        decodes: int,
        scale: float,
        window: int,
    ) -> None:
        """The last `decodes` sequences, with one row each, or none."""
        if self._counters is None:
            raise RuntimeError("attention before new_kv_layer: there is no cache yet")
        _, heads, head_dim = q.shape
        _, kv_heads, block_size, _ = kv.keys.shape
        group = heads // kv_heads
        longest = batch.block_tables.shape[1] * block_size
        if window:
            longest = min(longest, window + block_size)
        tiling = decode_tiling(padded(head_dim), kv.keys.dtype, decodes * kv_heads)
        splits = num_splits(decodes * kv_heads, self._processors, longest, tiling)
        shape = (decodes, kv_heads, splits, group)
        alone = splits == 1
        sums = out if alone else q.new_empty(*shape, head_dim, dtype=torch.float32)
        summary = out if alone else q.new_empty(*shape, 2, dtype=torch.float32)
        decode[(kv_heads, splits, decodes)](
            q,
            kv.keys,
            kv.values,
            out,
            sums,
            summary,
            self._counters,
            batch.query_start,
            batch.context_len,
            batch.slots,
            batch.block_tables,
            batch.block_tables.stride(0),
            len(batch.context_len) - decodes,
            splits,
            scale * math.log2(math.e),
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            WIDTH=padded(head_dim),
            BLOCK_SIZE=block_size,
            WINDOW=window,
            ALONE=alone,
            GROUP_P2=triton.next_power_of_2(group),
            ROWS=max(16, triton.next_power_of_2(group)),
            TILE=tiling.keys,
            STEP=tiling.step,
            E4M7=kv.keys.dtype == torch.uint8,
            ASSEMBLY=kv.keys.is_cuda,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            **overlapped(q.device),
        )


def num_splits(row_heads: int, processors: int, longest: int, tiling: DecodeTiling) -> int:
    """Programs to share a row's keys among: enough to fill the GPU, fixed for a batch size.

    row_heads: decodes x KV heads.  longest: tokens that a row can see.
    """
    if row_heads > _COUNTERS:
        return 1
    wanted = tiling.programs * processors // row_heads
    return max(1, min(wanted, _MAX_SPLITS, -(-longest // tiling.step)))


def _prefill(
    q: torch.Tensor,
    out: torch.Tensor,
    kv: KVLayer,
    batch: StepBatch,
    chunks: int,
    scale: float,
    window: int,
) -> None:
    """The first `chunks` sequences, which have the first rows, and may have all of them."""
    rows, heads, head_dim = q.shape
    _, kv_heads, block_size, _ = kv.keys.shape
    group = heads // kv_heads
    tile_rows, tile_keys, warps, stages = _prefill_tile(padded(head_dim), kv.keys.dtype, group)
    tiles = rows // (tile_rows // group) + chunks
    prefill[(kv_heads, tiles)](
        q,
        kv.keys,
        kv.values,
        out,
        batch.query_start,
        batch.context_len,
        batch.slots,
        batch.block_tables,
        batch.block_tables.stride(0),
        chunks,
        scale * math.log2(math.e),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        WIDTH=padded(head_dim),
        BLOCK_SIZE=block_size,
        WINDOW=window,
        ROWS=tile_rows,
        TILE=tile_keys,
        num_warps=warps,
        num_stages=stages,
        **overlapped(q.device),
    )


def _prefill_tile(width: int, dtype: torch.dtype, group: int) -> tuple[int, int, int, int]:
    """(rows, keys, warps, stages) of a tile; width: of a head's tile.

    Sizes for which a thread's registers are enough.
    """
    least = triton.next_power_of_2(group)
    if dtype == torch.float32:
        return max(16 if width > 64 else 32, least), 16 if width > 128 else 32, 4, 2
    if width > 128:
        return max(128, least), 32, 8, 2
    return max(64, least), 64, 4, 3
