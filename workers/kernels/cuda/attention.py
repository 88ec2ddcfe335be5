"""Causal attention over the paged cache: chunks by one kernel, decodes by another.

Both launches follow from plain ints and shapes (rows, sequences, chunks,
width of the block tables), so a captured launch serves any lengths, and any
smaller step, padded as StepBatch says.
"""

from __future__ import annotations

import math

import torch
import triton

from ...engine.batch import StepBatch
from ..interface import KVLayer
from .decode import decode
from .decode_tiling import COUNTERS, decode_tiling, num_splits
from .e4m7_decode import e4m7_decode, parts
from .e4m7_decode import supported as e4m7_supported
from .overlap import overlapped
from .paging import padded
from .prefill import prefill
from .widen import widen

_INTERPRETED_PROCESSORS = 16
_TWO_STAGES_BYTES = 106496
"""Of shared memory, for a prefill's tile of heads of 256: a program of an L40S has 101,376."""


class Attention:
    """See Kernels.attention.

    batch_invariant: decodes go the way of chunks, whose rows do not depend on
    the batch; split decodes do, by the number of splits.
    A step that has both runs them side by side: chunks' tiles wait for latency, decodes for memory.
    """

    def __init__(self, batch_invariant: bool) -> None:
        self._batch_invariant = batch_invariant
        self._processors = 0
        self._shared_bytes = _TWO_STAGES_BYTES
        self._counters: torch.Tensor | None = None
        self._side: torch.cuda.Stream | None = None

    def prepare(self, device: torch.device) -> None:
        """Makes what launches share: outside of a capture, before the first call."""
        if self._counters is not None:
            return
        self._processors = _INTERPRETED_PROCESSORS
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self._processors = properties.multi_processor_count
            self._shared_bytes = getattr(
                properties, "shared_memory_per_block_optin", _TWO_STAGES_BYTES
            )
            self._side = torch.cuda.Stream(device)
        self._counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)

    def __call__(
        self, q: torch.Tensor, kv: KVLayer, batch: StepBatch, scale: float, window: int
    ) -> torch.Tensor:
        rows, heads, head_dim = q.shape
        out = q.new_empty(rows, heads * head_dim)
        sequences = len(batch.context_len)
        chunks = sequences if self._batch_invariant else batch.num_chunks
        decodes = sequences - chunks
        if chunks and decodes and self._side is not None and _read_as_they_are(kv):
            step = torch.cuda.current_stream(q.device)
            self._side.wait_stream(step)
            with torch.cuda.stream(self._side):
                self._decode(q, out, kv, batch, decodes, scale, window)
            self._prefill(q, out, kv, batch, chunks, scale, window)
            step.wait_stream(self._side)
            return out
        if chunks:
            self._prefill(q, out, kv, batch, chunks, scale, window)
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
        if not _read_as_they_are(kv):
            assert kv.wide is not None
            widen(kv, kv.wide, batch, len(batch.context_len), window, self._processors)
            kv = kv.wide
        _, heads, head_dim = q.shape
        _, kv_heads, block_size, _ = kv.keys.shape
        group = heads // kv_heads
        longest = batch.block_tables.shape[1] * block_size
        if window:
            longest = min(longest, window + block_size)
        narrow = kv.keys.dtype == torch.uint8
        row_heads = decodes * kv_heads * (parts(group) if narrow else 1)
        width, processors = padded(head_dim), self._processors
        tiling = decode_tiling(width, kv.keys.dtype, row_heads, processors)
        splits = num_splits(row_heads, processors, longest, tiling)
        shape = (decodes, kv_heads, splits, group)
        alone = splits == 1
        sums = out if alone else q.new_empty(*shape, head_dim, dtype=torch.float32)
        summary = out if alone else q.new_empty(*shape, 2, dtype=torch.float32)
        if narrow:
            e4m7_decode(
                q, kv, out, sums, summary, self._counters, batch, decodes, splits, tiling,
                processors, scale, window,
            )  # fmt: skip
            return
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
            WIDTH=width,
            BLOCK_SIZE=block_size,
            WINDOW=window,
            ALONE=alone,
            GROUP_P2=triton.next_power_of_2(group),
            ROWS=max(16, triton.next_power_of_2(group)),
            TILE=tiling.keys,
            STEP=tiling.step,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            **overlapped(q.device),
        )

    def _prefill(
        self,
        q: torch.Tensor,
        out: torch.Tensor,
        kv: KVLayer,
        batch: StepBatch,
        chunks: int,
        scale: float,
        window: int,
    ) -> None:
        """The first `chunks` sequences, which have the first rows, and may have all of them."""
        if kv.wide is not None:
            widen(kv, kv.wide, batch, chunks, window, self._processors)
            kv = kv.wide
        rows, heads, head_dim = q.shape
        _, kv_heads, block_size, _ = kv.keys.shape
        group = heads // kv_heads
        tile_rows, tile_keys, warps, stages = _prefill_tile(
            padded(head_dim), kv.keys.dtype, group, self._shared_bytes
        )
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


def _read_as_they_are(kv: KVLayer) -> bool:
    """Whether decodes read the cache itself, and not what is unpacked of it."""
    if kv.wide is None:
        return True
    _, kv_heads, block_size, head_dim = kv.wide.keys.shape
    return e4m7_supported(kv.keys.device, head_dim, kv_heads, block_size)


def _prefill_tile(
    width: int, dtype: torch.dtype, group: int, shared_bytes: int
) -> tuple[int, int, int, int]:
    """(rows, keys, warps, stages) of a tile; width: of a head's tile.

    Sizes for which a thread's registers are enough, and the shared memory of a program.
    """
    least = triton.next_power_of_2(group)
    if dtype == torch.float32:
        return max(16 if width > 64 else 32, least), 16 if width > 128 else 32, 4, 2
    if width > 128:
        return max(128, least), 32, 8, 2 if shared_bytes >= _TWO_STAGES_BYTES else 1
    return max(64, least), 64, 4, 3
