"""Embedding lookup in a shard of the vocabulary."""

from __future__ import annotations

import torch

from ...machine_code import ItemFunction
from .simd import load_i64, pointer_i32, pointer_u16
from .threads import Parameters, Team

_LAYOUT = Parameters("7q")
_TOKENS, _TABLE, _OUT, _ROWS, _ROW_HALVES, _FIRST, _COUNT = range(0, 56, 8)


def _embed_item(p: int, item: int, scratch: int) -> None:
    """All rows: copies of 16-bit halves, whatever the dtype."""
    tokens, halves = pointer_i32(load_i64(p + _TOKENS)), load_i64(p + _ROW_HALVES)
    for row in range(load_i64(p + _ROWS)):
        entry = tokens[row] - load_i64(p + _FIRST)
        out = pointer_u16(load_i64(p + _OUT) + row * halves * 2)
        if 0 <= entry < load_i64(p + _COUNT):
            source = pointer_u16(load_i64(p + _TABLE) + entry * halves * 2)
            for i in range(halves):
                out[i] = source[i]
        else:
            for i in range(halves):
                out[i] = 0


embed_item = ItemFunction(_embed_item)


def embed(team: Team, tokens: torch.Tensor, table: torch.Tensor, first_id: int) -> torch.Tensor:
    """int32 [T] -> [T, hidden]; zeros for ids outside first_id .. first_id+len(table)-1."""
    rows = tokens.shape[0]
    count, width = table.shape
    out = table.new_empty(rows, width)
    team.launch(
        embed_item,
        1,
        False,
        _LAYOUT,
        tokens.data_ptr(),
        table.data_ptr(),
        out.data_ptr(),
        rows,
        width * table.itemsize // 2,
        first_id,
        count,
    )
    return out
