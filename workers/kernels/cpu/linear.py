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

from ...machine_code import ItemFunction, part
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


def _make_rows_times_panel(name: str, product: Any) -> Any:
    """Rows times one panel, for one dtype's product."""

    @part(name)
    def rows_times_panel(  # type: ignore[no-untyped-def]
        x, row_bytes, first, last, panel, steps, bias, out, out_row, to_bf16, columns, scratch
    ):
        """Rows first .. last-1 of x -> their `columns` outputs, from address out + row * out_row.

        scratch: the panel's address, a tile of results.
        """
        tile = scratch + VEC_BYTES
        store_i64(scratch, panel)
        store_i64(scratch + 8, panel + _AHEAD_BYTES)
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
                    halves = pointer_u16(out + (row + r) * out_row)
                    for c in range(columns):
                        halves[c] = narrow(source[c])
                else:
                    singles = pointer_f32(out + (row + r) * out_row)
                    for c in range(columns):
                        singles[c] = source[c]
            row += rows

    return rows_times_panel


rows_times_panel_bf16 = _make_rows_times_panel("bf16", wide_bf16)
rows_times_panel_f32 = _make_rows_times_panel("f32", wide_f32)


def _make_panel(name: str, rows_times_panel: Any) -> Any:
    """The item for one dtype."""

    @part(name)
    def panel(p: int, item: int, scratch: int) -> None:
        """A panel times a group of rows."""
        groups, group_rows = load_i64(p + _GROUPS), load_i64(p + _GROUP_ROWS)
        panel, first = item // groups, (item % groups) * group_rows
        last = min(first + group_rows, load_i64(p + _ROWS))
        steps, column = load_i64(p + _STEPS), panel * PANEL
        to_bf16 = load_i64(p + _OUT_BF16)
        rows_times_panel(
            load_i64(p + _X), load_i64(p + _ROW_BYTES), first, last,
            load_i64(p + _PANELS) + panel * steps * (PANEL * 4), steps,
            load_i64(p + _BIAS) + column * 4,
            load_i64(p + _OUT) + column * (2 if to_bf16 else 4), load_i64(p + _OUT_ROW_BYTES),
            to_bf16, min(PANEL, load_i64(p + _N) - column), scratch,
        )  # fmt: skip

    return panel


_panel_bf16 = _make_panel("bf16", rows_times_panel_bf16)
_panel_f32 = _make_panel("f32", rows_times_panel_f32)


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
    panels = new_panels(1, n, k, weight.dtype)[0]
    fill_panels(panels, weight)
    full_bias = torch.zeros(len(panels) * PANEL, dtype=torch.float32)
    if bias is not None:
        full_bias[:n] = bias
    return PackedLinear(n, k, panels, full_bias, out_dtype or weight.dtype)


def new_panels(count: int, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros for `count` weights [n, k]: [count, n/64, k/2, 64, 2] or [count, n/64, k, 64, 1]."""
    per_step = 2 if dtype == torch.bfloat16 else 1
    if k % per_step:
        raise ValueError(f"a bfloat16 weight needs an even number of inputs, not {k}")
    return torch.zeros(count, -(-n // PANEL), k // per_step, PANEL, per_step, dtype=dtype)


def fill_panels(panels: torch.Tensor, weight: torch.Tensor) -> None:
    """Writes a weight [n, k] into its panels, one weight of new_panels."""
    _, steps, _, per_step = panels.shape
    whole = len(weight) // PANEL
    by_panel = panels.transpose(1, 2)
    by_panel[:whole] = weight[: whole * PANEL].view(whole, PANEL, steps, per_step)
    rest = weight[whole * PANEL :]
    if len(rest):
        by_panel[whole, : len(rest)] = rest.view(len(rest), steps, per_step)


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
