"""A mixture of experts: rows are grouped by expert, in tiles that one expert multiplies.

    route     a program a row: its experts, their weights, and how many rows each expert has
    place     a program an expert: its rows, in their order, from a tile of its own on
    product   a tile of rows and some outputs: a GEMM with the tile's expert (twice)
    combine   the weighted sum of a row's results

An assignment is (row, pick), numbered row * chosen + pick; `order` holds those of
each tile, and a number past the last where a tile is not full.  How many tiles
there are follows from the data: the grid has room for the most there can be,
and programs beyond `used` return at once, so launches can be captured.  A row's
result is one sum over k in a fixed order, whatever else is in its tile.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from .activation import silu_mul

_COLUMNS = 1024
_CHUNK = 1024
_LEAST = tl.constexpr(-3e38)


@triton.jit
def _route(
    scores, picks, weights, counts,
    EXPERTS: tl.constexpr, CHOSEN: tl.constexpr, NORMALISE: tl.constexpr,
    PADDED: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """The highest scores first, and of equals the first; a NaN is the lowest."""
    row = tl.program_id(0).to(tl.int64)
    e, c = tl.arange(0, PADDED), tl.arange(0, SOME)
    score = tl.load(scores + row * EXPERTS + e, mask=e < EXPERTS, other=float("-inf"))
    key = tl.where(score == score, tl.maximum(score, _LEAST), _LEAST)
    key = tl.where(e < EXPERTS, key, float("-inf"))
    top = tl.max(key, 0)
    pick = tl.zeros([SOME], tl.int32)
    weight = tl.zeros([SOME], tl.float32)
    for i in tl.static_range(CHOSEN):
        highest = tl.max(key, 0)
        best = tl.min(tl.where(key == highest, e, PADDED), 0)
        value = tl.sum(tl.where(e == best, score, 0.0), 0)
        pick = tl.where(c == i, best, pick)
        weight = tl.where(c == i, tl.exp(value - top), weight)
        key = tl.where(e == best, float("-inf"), key)
    if NORMALISE:
        total = tl.sum(weight, 0)
    else:
        total = tl.sum(tl.where(e < EXPERTS, tl.exp(score - top), 0.0), 0)
    chosen = c < CHOSEN
    tl.store(picks + row * CHOSEN + c, pick, mask=chosen)
    tl.store(weights + row * CHOSEN + c, weight / total, mask=chosen)
    tl.atomic_add(counts + pick, tl.full([SOME], 1, tl.int32), mask=chosen, sem="relaxed")


@triton.jit(do_not_specialize=["assignments"])
def _place(
    picks, counts, order, tile_expert, used, assignments,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    e, i = tl.arange(0, PADDED), tl.arange(0, CHUNK)
    tiles = tl.cdiv(tl.load(counts + e, mask=e < EXPERTS, other=0), TILE)
    first = tl.sum(tl.where(e < expert, tiles, 0), 0)
    mine = tl.sum(tl.where(e == expert, tiles, 0), 0)
    if expert == EXPERTS - 1:
        tl.store(used, first + mine)
    for at in range(0, mine, CHUNK):
        tl.store(tile_expert + first + at + i, expert, mask=at + i < mine)
    place = first * TILE
    for at in range(0, assignments, CHUNK):
        picked = tl.load(picks + at + i, mask=at + i < assignments, other=-1) == expert
        before = tl.cumsum(picked.to(tl.int32), 0)
        tl.store(order + place + before - 1, at + i, mask=picked)
        place += tl.sum(picked.to(tl.int32), 0)
    j = place + tl.arange(0, TILE)
    tl.store(order + j, assignments, mask=j < (first + mine) * TILE)


@triton.jit(do_not_specialize=["assignments"])
def _product(
    x, weight, y, order, tile_expert, used, assignments,
    N: tl.constexpr, K: tl.constexpr, ROW_PICKS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """y [assignment, N]; ROW_PICKS: assignments that share a row of x."""
    tile = tl.program_id(1)
    if tile >= tl.load(used):
        return
    expert = tl.load(tile_expert + tile).to(tl.int64)
    assignment = tl.load(order + tile * TILE_M + tl.arange(0, TILE_M)).to(tl.int64)
    column = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    i = tl.arange(0, TILE_K)
    is_row = (assignment < assignments)[:, None]
    is_column = (column < N)[None, :]
    a = x + (assignment // ROW_PICKS)[:, None] * K + i[None, :]
    b = weight + expert * (N * K) + column.to(tl.int64)[None, :] * K + i[:, None]
    total = tl.zeros([TILE_M, TILE_N], tl.float32)
    for start in range(0, K, TILE_K):
        inside = i < K - start
        some = tl.load(a + start, mask=is_row & inside[None, :], other=0.0)
        other = tl.load(b + start, mask=is_column & inside[:, None], other=0.0)
        total = tl.dot(some, other, total, input_precision="ieee")
    target = y + assignment[:, None] * N + column[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=is_row & is_column)


@triton.jit
def _combine(parts, weights, out, WIDTH: tl.constexpr, CHOSEN: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < WIDTH
    total = tl.zeros([COLUMNS], tl.float32)
    for c in tl.static_range(CHOSEN):
        part = tl.load(parts + (row * CHOSEN + c) * WIDTH + column, mask=here, other=0.0)
        total += tl.load(weights + row * CHOSEN + c) * part
    tl.store(out + row * WIDTH + column, total.to(out.dtype.element_ty), mask=here)


class Grouping:
    """Assignments in tiles of `rows`: order [tiles * rows], tile_expert [tiles], used [1]."""

    def __init__(self, picks: torch.Tensor, counts: torch.Tensor, rows: int) -> None:
        experts, self.assignments, self.rows = len(counts), picks.numel(), rows
        self.tiles = min(experts, self.assignments) + self.assignments // rows
        self.order = picks.new_empty(self.tiles * rows)
        self.tile_expert = picks.new_empty(self.tiles)
        self.used = picks.new_empty(1)
        _place[(experts,)](
            picks,
            counts,
            self.order,
            self.tile_expert,
            self.used,
            self.assignments,
            EXPERTS=experts,
            PADDED=triton.next_power_of_2(experts),
            TILE=rows,
            CHUNK=_CHUNK,
            num_warps=4,
        )

    def product(
        self, x: torch.Tensor, weight: torch.Tensor, row_picks: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """x [assignments / row_picks, k] by weight [experts, n, k] -> [assignments, n]."""
        _, n, k = weight.shape
        y = x.new_empty(self.assignments, n, dtype=dtype)
        columns, depth = (64, 64) if x.dtype == torch.bfloat16 else (32, 32)
        _product[(triton.cdiv(n, columns), self.tiles)](
            x,
            weight,
            y,
            self.order,
            self.tile_expert,
            self.used,
            self.assignments,
            N=n,
            K=k,
            ROW_PICKS=row_picks,
            TILE_M=self.rows,
            TILE_N=columns,
            TILE_K=depth,
            num_warps=4,
            num_stages=3,
        )
        return y


def tile_rows(assignments: int, experts: int, dtype: torch.dtype, batch_invariant: bool) -> int:
    """Rows of a tile: about what an expert gets; one size where rows must not see each other."""
    most = 64 if dtype == torch.bfloat16 else 32
    if batch_invariant:
        return most
    rows: int = triton.next_power_of_2(assignments // experts)
    return min(max(rows, 16), most)


def pack_experts(weights: Iterable[torch.Tensor], count: int, device: torch.device) -> torch.Tensor:
    """[count, n, k] on the device."""
    packed, filled = None, 0
    for index, weight in enumerate(weights):
        if packed is None:
            packed = torch.empty(count, *weight.shape, dtype=weight.dtype, device=device)
        packed[index] = weight
        filled += 1
    if packed is None or filled != count:
        raise ValueError(f"{filled} weights for {count} experts")
    return packed


def experts(
    x: torch.Tensor, scores: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    chosen: int, normalise: bool, batch_invariant: bool,
) -> torch.Tensor:  # fmt: skip
    """See Kernels.experts."""
    rows, hidden = x.shape
    out = torch.empty_like(x)
    if not rows:
        return out
    count = len(gate_up)
    picks = torch.empty((rows, chosen), dtype=torch.int32, device=x.device)
    weights = torch.empty((rows, chosen), dtype=torch.float32, device=x.device)
    counts = torch.zeros(count, dtype=torch.int32, device=x.device)
    _route[(rows,)](
        scores,
        picks,
        weights,
        counts,
        EXPERTS=count,
        CHOSEN=chosen,
        NORMALISE=normalise,
        PADDED=triton.next_power_of_2(count),
        SOME=triton.next_power_of_2(chosen),
        num_warps=1,
    )
    grouping = Grouping(picks, counts, tile_rows(rows * chosen, count, x.dtype, batch_invariant))
    inner = grouping.product(x, gate_up, chosen, x.dtype)
    parts = grouping.product(silu_mul(inner), down, 1, torch.float32)
    _combine[(rows, triton.cdiv(hidden, _COLUMNS))](
        parts, weights, out, WIDTH=hidden, CHOSEN=chosen, COLUMNS=_COLUMNS, num_warps=4
    )
    return out
