"""Linear layers: weights in panels of 64 outputs, streamed once for all rows.

    panels bfloat16 [n/64, k/2, 64, 2]      float32 [n/64, k, 64]

n is padded with zeros to whole panels.  An item is one panel times a group of
rows; a panel stays in the second-level cache while its rows pass by.  Each
output is one chain over k, whatever the other rows and the threads: the
result of a row never depends on the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from numba import njit

from ...machine_code import ItemFunction
from .products import MAX_ROWS, WIDE, wide_bf16, wide_f32
from .simd import (
    LANES,
    VEC_BYTES,
    load_i64,
    narrow,
    pointer_f32,
    pointer_u16,
    store_i64,
)
from .threads import Parameters, Team

PANEL = WIDE * LANES
"""Outputs of a panel."""
_ROW_GROUP = 4 * MAX_ROWS
"""Rows below which a panel's rows are not split over threads."""
_WORTH_SHARING = 1 << 19
"""Multiply-adds (and weights read) that cost about what waking a helper does."""

_AHEAD_BYTES = 4096
"""How far ahead of its use a panel is fetched."""


_LAYOUT = Parameters("12q")
(
    _X, _PANELS, _BIAS, _OUT, _ROWS, _ROW_BYTES, _STEPS, _N, _OUT_BF16, _GROUPS, _GROUP_ROWS,
    _OUT_ROW_BYTES,
) = range(0, 96, 8)  # fmt: skip


def _make_panel(product: Any) -> Any:
    """The item for one dtype's product."""

    @njit(nogil=True)
    def panel(p: int, item: int, scratch: int) -> None:
        """A panel times a group of rows; scratch: the panel's address, a tile of results."""
        groups, group_rows = load_i64(p + _GROUPS), load_i64(p + _GROUP_ROWS)
        panel, first = item // groups, (item % groups) * group_rows
        last = min(first + group_rows, load_i64(p + _ROWS))
        steps, row_bytes, n = load_i64(p + _STEPS), load_i64(p + _ROW_BYTES), load_i64(p + _N)
        x, out, out_row = load_i64(p + _X), load_i64(p + _OUT), load_i64(p + _OUT_ROW_BYTES)
        to_bf16 = load_i64(p + _OUT_BF16)
        column = panel * PANEL
        columns = min(PANEL, n - column)
        bias = load_i64(p + _BIAS) + column * 4
        tile = scratch + VEC_BYTES
        start = load_i64(p + _PANELS) + panel * steps * (PANEL * 4)
        store_i64(scratch, start)
        store_i64(scratch + 8, start + _AHEAD_BYTES)
        tiles = (last - first + MAX_ROWS - 1) // MAX_ROWS
        row = first
        for done in range(tiles):
            rows = (last - row + tiles - done - 1) // (tiles - done)
            product(
                rows, x + row * row_bytes, row_bytes, scratch, scratch + 8, 1,
                steps, PANEL * 4,
                bias, 0, tile, PANEL * 4,
            )  # fmt: skip
            for r in range(rows):
                source = pointer_f32(tile + r * (PANEL * 4))
                if to_bf16:
                    halves = pointer_u16(out + (row + r) * out_row + column * 2)
                    for c in range(columns):
                        halves[c] = narrow(source[c])
                else:
                    singles = pointer_f32(out + (row + r) * out_row + column * 4)
                    for c in range(columns):
                        singles[c] = source[c]
            row += rows

    return panel


_panel_bf16 = _make_panel(wide_bf16)
_panel_f32 = _make_panel(wide_f32)


def _linear_bf16(p: int, item: int, scratch: int) -> None:
    _panel_bf16(p, item, scratch)


def _linear_f32(p: int, item: int, scratch: int) -> None:
    _panel_f32(p, item, scratch)


linear_bf16 = ItemFunction(_linear_bf16)
linear_f32 = ItemFunction(_linear_f32)


class PackedLinear:
    """A weight [n, k] in panels with its bias [n, padded] in float32; addresses at hand."""

    __slots__ = (
        "bias", "bias_at", "dtype", "function", "k", "n", "num_panels", "out_dtype",
        "out_is_bf16", "out_row_bytes", "panels", "panels_at", "row_bytes", "steps",
    )  # fmt: skip

    def __init__(
        self, n: int, k: int, panels: torch.Tensor, bias: torch.Tensor, out_dtype: torch.dtype
    ) -> None:
        self.n, self.k = n, k
        self.dtype, self.out_dtype = panels.dtype, out_dtype
        self.panels, self.bias = panels, bias
        self.panels_at, self.bias_at = panels.data_ptr(), bias.data_ptr()
        self.num_panels, self.steps = panels.shape[0], panels.shape[1]
        self.row_bytes, self.out_row_bytes = k * panels.itemsize, n * out_dtype.itemsize
        self.out_is_bf16 = out_dtype == torch.bfloat16
        self.function = linear_bf16 if panels.dtype == torch.bfloat16 else linear_f32


def pack_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype | None
) -> PackedLinear:
    """Packs a weight [n, k]; results are of `out_dtype`, or of the weight's dtype."""
    n, k = weight.shape
    padded = -(-n // PANEL) * PANEL
    per_step = 2 if weight.dtype == torch.bfloat16 else 1
    if k % per_step:
        raise ValueError(f"a bfloat16 weight needs an even number of inputs, not {k}")
    panels = weight.new_zeros(padded // PANEL, k // per_step, PANEL, per_step)
    whole = n // PANEL
    by_panel = panels.transpose(1, 2)
    by_panel[:whole] = weight[: whole * PANEL].view(whole, PANEL, k // per_step, per_step)
    if padded != n:
        rest = weight[whole * PANEL :]
        by_panel[whole, : len(rest)] = rest.view(len(rest), k // per_step, per_step)
    full_bias = torch.zeros(padded, dtype=torch.float32)
    if bias is not None:
        full_bias[:n] = bias
    return PackedLinear(n, k, panels, full_bias, out_dtype or weight.dtype)


def linear(team: Team, x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    """[T, k] -> [T, n]: x @ weight.T + bias."""
    rows, inputs = x.shape
    if inputs != packed.k or x.dtype != packed.dtype or not x.is_contiguous():
        raise ValueError(
            f"linear takes contiguous rows of {packed.k} {packed.dtype}, "
            f"not {inputs} {x.dtype} with strides {x.stride()}"
        )
    if packed.out_dtype == packed.dtype:
        out = x.new_empty(rows, packed.n)
    else:
        out = torch.empty((rows, packed.n), dtype=packed.out_dtype)
    groups = 1
    if rows >= 2 * _ROW_GROUP and team.threads > 1:
        groups = min(2 * team.threads, rows // _ROW_GROUP)
    team.launch(
        packed.function,
        packed.num_panels * groups,
        rows * packed.n * packed.k > _WORTH_SHARING,
        _LAYOUT,
        x.data_ptr(),
        packed.panels_at,
        packed.bias_at,
        out.data_ptr(),
        rows,
        packed.row_bytes,
        packed.steps,
        packed.n,
        packed.out_is_bf16,
        groups,
        -(-rows // groups),
        packed.out_row_bytes,
    )
    return out
