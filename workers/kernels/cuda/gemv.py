"""A linear layer of one row: weights read once, at the speed of the memory.

    grid  (n / rows); a program has `rows` outputs; its threads share out k

Each thread adds up what it reads, `columns` of every row a round, and the
threads' sums are added once at the end: one order of summation for a layer,
whatever else runs.  With more than one stage the next rounds' weights are on
their way to shared memory meanwhile.  The first round's are read before the
kernel before has ended (overlap.py).

The tiling follows from the layer's shape alone, so that all ranks take the
same; tools/gpu_kernel_bench.py --tune-linear looks for better ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .overlap import come_up, overlapped, wait


@dataclass(frozen=True, slots=True)
class GemvTiling:
    """rows of the weight a program has, columns of a round; stages: 1 is straight to registers.

    once: L2 need not keep the weights; asynchronous copies (stages > 1) take no such hint.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    once: bool = False


_TILE = 4096
"""Weights of a round, 8 KB of bfloat16: 64 bytes in flight for each of 128 threads."""

_MAX_ROWS = 8


def gemv_tiling(k: int) -> GemvTiling:
    """For a weight of `k` columns: whole rows of a round where they fit, straight to registers.

    Measured on an H100 for the layers of Qwen3-0.6B and 8B: the best of sixteen tilings, or
    within 1% of it, in all eight; 0.57 to 0.90 of cuBLAS's time.
    """
    columns = min(triton.next_power_of_2(k), _TILE)
    return GemvTiling(min(_TILE // columns, _MAX_ROWS), columns, warps=4, stages=1, once=True)


@triton.jit
def _inside(i, start, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Which columns of the round from `start` on there are."""
    if K % COLUMNS == 0:
        inside = tl.full([COLUMNS], True, tl.int1)
    else:
        inside = i < K - start
    return inside


@triton.jit(do_not_specialize=["n"])
def _gemv(
    x, weight, bias, y, n, K: tl.constexpr, WITH_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, EVICTION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    come_up(OVERLAP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, COLUMNS)
    here = row < n
    place = weight + row.to(tl.int64)[:, None] * K + i[None, :]
    inside = _inside(i, 0, K, COLUMNS)
    mask = here[:, None] & inside[None, :]
    first = tl.load(place, mask=mask, other=0.0, eviction_policy=EVICTION)
    wait(OVERLAP)
    values = tl.load(x + i, mask=inside, other=0.0)
    total = first.to(tl.float32) * values.to(tl.float32)[None, :]
    # Only stages named here, not those of the launch, pipeline a loop without a tl.dot.
    for start in tl.range(COLUMNS, K, COLUMNS, num_stages=STAGES):
        inside = _inside(i, start, K, COLUMNS)
        mask = here[:, None] & inside[None, :]
        some = tl.load(place + start, mask=mask, other=0.0, eviction_policy=EVICTION)
        values = tl.load(x + start + i, mask=inside, other=0.0)
        total += some.to(tl.float32) * values.to(tl.float32)[None, :]
    result = tl.sum(total, 1)
    if WITH_BIAS:
        result += tl.load(bias + row, mask=here, other=0.0).to(tl.float32)
    tl.store(y + row, result.to(y.dtype.element_ty), mask=here)


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tiling: GemvTiling,
) -> torch.Tensor:
    """[1, k] -> [1, n]"""
    n, k = weight.shape
    y = x.new_empty(1, n, dtype=out_dtype)
    _gemv[(triton.cdiv(n, tiling.rows),)](
        x,
        weight,
        weight if bias is None else bias,
        y,
        n,
        K=k,
        WITH_BIAS=bias is not None,
        ROWS=tiling.rows,
        COLUMNS=tiling.columns,
        STAGES=tiling.stages,
        EVICTION="evict_first" if tiling.once else "",
        num_warps=tiling.warps,
        **overlapped(x.device),
    )
    return y
