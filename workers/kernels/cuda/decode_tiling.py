"""How the keys of decodes are cut up among programs.  Measured on an H100 (tools/
gpu_kernel_bench.py --tune), alone and among a layer's other kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch

COUNTERS = 4096
"""Rows x KV heads, or parts of their query heads, that can be shared out among programs."""
_MAX_SPLITS = 64
_FEW_ROW_HEADS = 256
"""Two for each multiprocessor of an H100, which more programs share than fit at once."""

ROUND = 16
"""Keys that a warp has at once, of a cache in 12 bits."""
WARPS_OF_PROCESSOR = {64: 16, 128: 16, 256: 8}
"""Of these, that have registers there, by head size."""
_WARPS = {16: (8, 4, 4, 4, 4, 4, 4, 2), 8: (8, 4, 2, 2, 2, 2, 2, 1)}
"""Of a program, by that, where a multiprocessor has one program, 2, .. 8 or more."""
_LATENCY_ROW_HEADS = 16
"""So few that nothing counts but how soon a program is done."""


class DecodeTiling(NamedTuple):
    """keys: of one round of a program.  step: a program's share is a multiple of it.

    programs: for each multiprocessor, so that enough loads are in flight.
    """

    keys: int
    step: int
    programs: int
    warps: int
    stages: int


def decode_tiling(width: int, dtype: torch.dtype, row_heads: int, processors: int) -> DecodeTiling:
    """width: of a head's tile.  dtype: of the cache.  row_heads: decodes x KV heads,
    and parts of their query heads where programs share these.

    Many: rounds of 16 KB of keys, and as much of values.  Few, where every
    program has only some rounds and latency decides: half of that, a round more on
    its way, for half the warps, and all programs at once.  Head size 128, context 320, 4 KV
    heads, at 4, 64 and 256 sequences x heads: 5.7 us, 9.7 and 19.0, where rounds of 16 KB take
    25.3 for 256.
    """
    if dtype == torch.uint8:
        return _e4m7_tiling(width, row_heads, processors)
    keys = min(max(16384 // (width * dtype.itemsize), 16), 128)
    if row_heads <= _FEW_ROW_HEADS:
        return DecodeTiling(keys=max(keys // 2, 16), step=64, programs=2, warps=2, stages=3)
    return DecodeTiling(keys=keys, step=32, programs=4, warps=4, stages=2)


def _e4m7_tiling(head_dim: int, row_heads: int, processors: int) -> DecodeTiling:
    """Of e4m7_decode.py: one program a row and KV head as soon as these fill the GPU, the more
    warps the fewer they are."""
    warps = _WARPS[WARPS_OF_PROCESSOR[head_dim]]
    programs = min(-(-row_heads // processors), len(warps))
    if row_heads <= _LATENCY_ROW_HEADS:
        keys = step = 4 * ROUND
    else:
        keys = warps[programs - 1] * ROUND
        step = 2 * keys
    return DecodeTiling(keys, step, programs, warps=keys // ROUND, stages=2)


def num_splits(row_heads: int, processors: int, longest: int, tiling: DecodeTiling) -> int:
    """Programs to share a row's keys among: enough to fill the GPU, fixed for a batch size.

    row_heads: decodes x KV heads.  longest: tokens that a row can see.
    """
    if row_heads > COUNTERS:
        return 1
    wanted = tiling.programs * processors // row_heads
    return max(1, min(wanted, _MAX_SPLITS, -(-longest // tiling.step)))
