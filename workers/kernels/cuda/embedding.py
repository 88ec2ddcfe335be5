"""Rows of the embedding table by token id; ids of other ranks' shards give zeros."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .overlap import come_up, overlapped, wait

_COLUMNS = 2048


@triton.jit
def _embed(
    tokens, table, out, first_id, length,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    come_up(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < WIDTH
    wait(OVERLAP)
    entry = tl.load(tokens + row) - first_id
    in_shard = (entry >= 0) & (entry < length)
    source = table + entry.to(tl.int64) * WIDTH + column
    tl.store(
        out + row * WIDTH + column, tl.load(source, mask=here & in_shard, other=0.0), mask=here
    )


def embed(tokens: torch.Tensor, table: torch.Tensor, first_id: int) -> torch.Tensor:
    """int32 [T] -> [T, hidden]; zeros for ids outside first_id .. first_id+len(table)-1."""
    rows, (length, width) = tokens.shape[0], table.shape
    out = table.new_empty(rows, width)
    if rows:
        columns = min(triton.next_power_of_2(width), _COLUMNS)
        _embed[(rows, triton.cdiv(width, columns))](
            tokens, table, out, first_id, length, WIDTH=width, COLUMNS=columns, num_warps=4,
            **overlapped(table.device),
        )  # fmt: skip
    return out
