"""A linear layer of 2 to 64 rows: how soon the weights are asked for decides, not the arithmetic.

    grid  (n / outputs, splits); a program has some outputs of all rows, and a share of k

The weight is the tensor cores' left operand, so that few rows of input cost no
padding to speak of.  A program asks for the first of its weights before the
kernel before it has ended (overlap.py); cuBLAS's kernels cannot come up early.
Where there are fewer tiles than the GPU can have programs, k is shared out, and
the program that finishes last adds up what all have left, in the order of k: the
result does not depend on who was last.

`counters` counts the finished programs of a tile; it is all zeros between launches.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .ahead import fetch
from .overlap import come_up, overlapped, wait

MAX_ROWS = 64

_COUNTERS = 4096
"""Tiles whose k can be shared out."""
_MULTIPROCESSORS = 132
_ENOUGH = 72
"""Programs that read at the memory's speed."""
_SHARED_BYTES = 220 << 10
"""Of one multiprocessor of an H100."""


class FewRowsTiling(NamedTuple):
    """outputs, columns: of a round of a program.  splits: programs that share k."""

    outputs: int
    columns: int
    splits: int
    stages: int


def few_rows_tiling(n: int, k: int, rows: int) -> FewRowsTiling | None:
    """For a weight [n, k] of bfloat16; None where cuBLAS has to do it.

    Measured on an H100 (tools/gpu_kernel_bench.py --tune-linear) for the layers of Qwen3-8B and
    halves of them, at 16 and 64 rows: the best of 17 to 51 tilings or within 3% of it.
    """
    outputs, columns = 64, 128
    tiles, rounds = n // outputs, k // columns
    if n % outputs or k % columns:
        return None
    share = triton.cdiv(rounds, max(1, min(triton.cdiv(_ENOUGH, tiles), rounds // 2)))
    splits = triton.cdiv(rounds, share)
    stage_bytes = (outputs + _padded(rows)) * columns * 2
    at_once = 1 if tiles * splits <= _MULTIPROCESSORS else 2
    return FewRowsTiling(outputs, columns, splits, min(6, _SHARED_BYTES // at_once // stage_bytes))


def _padded(rows: int) -> int:
    """Rows of a tile: what the tensor cores take."""
    return max(16, 1 << (rows - 1).bit_length())


@triton.jit(do_not_specialize=["rows"])
def _few_rows(
    x, weight, bias, y, sums, counters, rows,
    N: tl.constexpr, K: tl.constexpr, WITH_BIAS: tl.constexpr, ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """OUTPUTS divides N, COLUMNS divides K.  ROWS: `rows`, padded.  No share is empty."""
    come_up(OVERLAP)
    tile, split = tl.program_id(0), tl.program_id(1)
    SHARE: tl.constexpr = (K // COLUMNS + SPLITS - 1) // SPLITS * COLUMNS
    PLACES: tl.constexpr = OUTPUTS * ROWS
    n, r, i = tile * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    begin = split * SHARE
    line = weight + n.to(tl.int64) * K
    if OVERLAP:
        fetch((line + begin).to(tl.int64), COLUMNS * 2)
    wait(OVERLAP)
    here = (r < rows)[None, :]
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for at in range(begin, tl.minimum(begin + SHARE, K), COLUMNS):
        some = tl.load(line[:, None] + (at + i)[None, :])
        values = tl.load(x + r[None, :] * K + (at + i)[:, None], mask=here, other=0.0)
        total = tl.dot(some, values, total)
    last = True
    if SPLITS > 1:
        mine = sums + tile * (SPLITS * PLACES)
        place = tl.arange(0, OUTPUTS)[:, None] * ROWS + r[None, :]
        tl.store(mine + split * PLACES + place, total)
        # All threads have stored before one says so; who counts last sees all sums.
        tl.debug_barrier()
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            tl.store(counters + tile, 0)
            total = tl.zeros([OUTPUTS, ROWS], tl.float32)
            for other in tl.static_range(SPLITS):
                total += tl.load(mine + other * PLACES + place, cache_modifier=".cg")
    if last:
        if WITH_BIAS:
            total += tl.load(bias + n).to(tl.float32)[:, None]
        tl.store(y + r[None, :] * N + n[:, None], total.to(y.dtype.element_ty), mask=here)


def few_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tiling: FewRowsTiling,
) -> torch.Tensor:
    """[T, k] -> [T, n], T from 1 to MAX_ROWS; both contiguous."""
    rows, (n, k) = len(x), weight.shape
    padded, tiles = _padded(rows), n // tiling.outputs
    y = x.new_empty(rows, n, dtype=out_dtype)
    sums = y
    if tiling.splits > 1:
        sums = x.new_empty(tiling.splits * n * padded, dtype=torch.float32)
    _few_rows[(tiles, tiling.splits)](
        x,
        weight,
        weight if bias is None else bias,
        y,
        sums,
        counters(x.device),
        rows,
        N=n,
        K=k,
        WITH_BIAS=bias is not None,
        ROWS=padded,
        OUTPUTS=tiling.outputs,
        COLUMNS=tiling.columns,
        SPLITS=tiling.splits,
        num_warps=4,
        num_stages=tiling.stages,
        **overlapped(x.device),
    )
    return y


@functools.cache
def counters(device: torch.device) -> torch.Tensor:
    """What all launches share; made outside of a capture (pack_linear)."""
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
