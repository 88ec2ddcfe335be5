"""A mixture of experts: rows are sorted by their expert, and each expert multiplies its rows.

    route     a few rows an item: which experts, and their weights
    group     all assignments (row, expert) in the order of the experts
    product   a panel of an expert that has rows, times its rows: one item
    combine   a few rows an item: the weighted sum of a row's results

Every output is one chain of a fixed order (linear.py), and a row's results are
added in the order of its picks: it does not depend on the other rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ...machine_code import ItemFunction, native, part
from .activation import silu_mul
from .linear import PANEL, fill_panels, new_panels, rows_times_panel_bf16, rows_times_panel_f32
from .rows import write_row
from .simd import load_i64, pointer_f32, pointer_i32
from .threads import Parameters, Team, item_rows

_WORTH_SHARING = 1 << 19
"""Multiply-adds that cost about what waking a helper does."""

_ROUTE = Parameters("8q")
(
    _SCORES, _PICKS, _WEIGHTS, _ROUTE_ROWS, _ROUTE_ITEM_ROWS, _EXPERTS, _CHOSEN, _NORMALISE,
) = range(0, 64, 8)  # fmt: skip


def _route_item(p: int, item: int, scratch: int) -> None:
    """Rows of scores -> picks, highest first and the first of equals, and their weights."""
    experts, chosen = load_i64(p + _EXPERTS), load_i64(p + _CHOSEN)
    free = pointer_i32(scratch)
    first = item * load_i64(p + _ROUTE_ITEM_ROWS)
    last = min(first + load_i64(p + _ROUTE_ITEM_ROWS), load_i64(p + _ROUTE_ROWS))
    for row in range(first, last):
        scores = pointer_f32(load_i64(p + _SCORES) + row * experts * 4)
        picks = pointer_i32(load_i64(p + _PICKS) + row * chosen * 4)
        weights = pointer_f32(load_i64(p + _WEIGHTS) + row * chosen * 4)
        for e in range(experts):
            free[e] = 1
        total = 0.0
        for c in range(chosen):
            best = -1
            for e in range(experts):
                if free[e] == 1 and (best < 0 or scores[e] > scores[best]):
                    best = e
            free[best] = 0
            picks[c] = best
            weight = math.exp(np.float64(scores[best]) - np.float64(scores[picks[0]]))
            weights[c] = np.float32(weight)
            total += weight
        if load_i64(p + _NORMALISE) == 0:
            total = 0.0
            for e in range(experts):
                total += math.exp(np.float64(scores[e]) - np.float64(scores[picks[0]]))
        for c in range(chosen):
            weights[c] = np.float32(weights[c] / total)


route_item = ItemFunction(_route_item)


@native("int64(int64, int64, int64, int64, int64, int64, int64)")
def _group(picks, assignments, chosen, experts, rows, places, groups):  # type: ignore[no-untyped-def]
    """Sorts assignments by expert, in the order of rows; returns the number of groups.

    rows[i]: the row at place i; places[a]: where assignment a went; groups: for
    each expert that has rows (expert, first place, place after the last).
    """
    pick, row, place = pointer_i32(picks), pointer_i32(rows), pointer_i32(places)
    group = pointer_i32(groups)
    starts = np.zeros(experts + 1, np.int64)
    for a in range(assignments):
        starts[pick[a] + 1] += 1
    count = 0
    for e in range(experts):
        if starts[e + 1]:
            group[3 * count] = e
            group[3 * count + 1] = starts[e]
            group[3 * count + 2] = starts[e] + starts[e + 1]
            count += 1
        starts[e + 1] += starts[e]
    for a in range(assignments):
        at = starts[pick[a]]
        starts[pick[a]] += 1
        row[at] = a // chosen
        place[a] = at
    return count


_PRODUCT = Parameters("10q")
(
    _X, _PANELS, _BIAS, _OUT, _GROUPS, _NUM_PANELS, _STEPS, _N, _ROW_BYTES, _OUT_BF16,
) = range(0, 80, 8)  # fmt: skip


def _make_product(name: str, rows_times_panel: Any) -> Any:
    @part(name)
    def product(p: int, item: int, scratch: int) -> None:
        """One panel of one expert times the rows of its group."""
        panels, steps, n = load_i64(p + _NUM_PANELS), load_i64(p + _STEPS), load_i64(p + _N)
        group = pointer_i32(load_i64(p + _GROUPS) + item // panels * 12)
        panel, to_bf16 = item % panels, load_i64(p + _OUT_BF16)
        size = 2 if to_bf16 else 4
        start = (np.int64(group[0]) * panels + panel) * steps * (PANEL * 4)
        rows_times_panel(
            load_i64(p + _X), load_i64(p + _ROW_BYTES), np.int64(group[1]), np.int64(group[2]),
            load_i64(p + _PANELS) + start, steps, load_i64(p + _BIAS),
            load_i64(p + _OUT) + panel * PANEL * size, n * size,
            to_bf16, min(PANEL, n - panel * PANEL), scratch,
        )  # fmt: skip

    return product


_product_bf16 = _make_product("bf16", rows_times_panel_bf16)
_product_f32 = _make_product("f32", rows_times_panel_f32)


def _experts_bf16(p: int, item: int, scratch: int) -> None:
    _product_bf16(p, item, scratch)


def _experts_f32(p: int, item: int, scratch: int) -> None:
    _product_f32(p, item, scratch)


experts_bf16 = ItemFunction(_experts_bf16)
experts_f32 = ItemFunction(_experts_f32)

_COMBINE = Parameters("9q")
(
    _PARTS, _PLACES, _SHARES, _SUM, _SUM_ROWS, _SUM_ITEM_ROWS, _WIDTH, _PICKED, _BF16,
) = range(0, 72, 8)  # fmt: skip


def _combine_item(p: int, item: int, scratch: int) -> None:
    """float32 results at their places -> rows, weighted and summed in the order of the picks."""
    width, chosen = load_i64(p + _WIDTH), load_i64(p + _PICKED)
    is_bf16 = load_i64(p + _BF16)
    total = pointer_f32(scratch)
    first = item * load_i64(p + _SUM_ITEM_ROWS)
    for row in range(first, min(first + load_i64(p + _SUM_ITEM_ROWS), load_i64(p + _SUM_ROWS))):
        places = pointer_i32(load_i64(p + _PLACES) + row * chosen * 4)
        shares = pointer_f32(load_i64(p + _SHARES) + row * chosen * 4)
        for i in range(width):
            total[i] = np.float32(0)
        for c in range(chosen):
            part = pointer_f32(load_i64(p + _PARTS) + np.int64(places[c]) * width * 4)
            share = shares[c]
            for i in range(width):
                total[i] += share * part[i]
        write_row(scratch, is_bf16, width, load_i64(p + _SUM) + row * width * (2 if is_bf16 else 4))


combine_item = ItemFunction(_combine_item)


class PackedExperts:
    """Weights [n, k] of all experts in panels, as PackedLinear's; a bias of zeros."""

    __slots__ = ("bias", "count", "function", "k", "n", "panels")

    def __init__(self, weights: Iterable[torch.Tensor], count: int) -> None:
        self.count = count
        packed = 0
        for index, weight in enumerate(weights):
            if index == 0:
                self.n, self.k = weight.shape
                self.panels = new_panels(count, self.n, self.k, weight.dtype)
            fill_panels(self.panels[index], weight)
            packed += 1
        if packed != count:
            raise ValueError(f"{packed} weights for {count} experts")
        self.bias = torch.zeros(PANEL)
        self.function = experts_bf16 if self.panels.dtype == torch.bfloat16 else experts_f32


def _product(
    team: Team, x: torch.Tensor, packed: PackedExperts, groups: torch.Tensor, num_groups: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Sorted rows [A, k] -> [A, n], each by its expert."""
    out = torch.empty((len(x), packed.n), dtype=out_dtype)
    panels = packed.panels.shape[1]
    team.launch(
        packed.function,
        num_groups * panels,
        len(x) * packed.n * packed.k > _WORTH_SHARING,
        _PRODUCT,
        x.data_ptr(),
        packed.panels.data_ptr(),
        packed.bias.data_ptr(),
        out.data_ptr(),
        groups.data_ptr(),
        panels,
        packed.panels.shape[2],
        packed.n,
        packed.k * x.itemsize,
        out_dtype == torch.bfloat16,
    )
    return out


def experts(
    team: Team, x: torch.Tensor, scores: torch.Tensor, gate_up: PackedExperts,
    down: PackedExperts, chosen: int, normalise: bool,
) -> torch.Tensor:  # fmt: skip
    """See Kernels.experts."""
    rows, hidden = x.shape
    picks = torch.empty((rows, chosen), dtype=torch.int32)
    weights = torch.empty((rows, chosen), dtype=torch.float32)
    per_item, items = item_rows(rows, gate_up.count * chosen, team.threads)
    team.launch(
        route_item, items, items > 1, _ROUTE, scores.data_ptr(), picks.data_ptr(),
        weights.data_ptr(), rows, per_item, gate_up.count, chosen, normalise,
    )  # fmt: skip
    sources, places = torch.empty(2, rows * chosen, dtype=torch.int32)
    groups = torch.empty((gate_up.count, 3), dtype=torch.int32)
    num_groups = _group(
        picks.data_ptr(), rows * chosen, chosen, gate_up.count,
        sources.data_ptr(), places.data_ptr(), groups.data_ptr(),
    )  # fmt: skip
    inner = _product(team, x.index_select(0, sources), gate_up, groups, num_groups, x.dtype)
    parts = _product(team, silu_mul(team, inner), down, groups, num_groups, torch.float32)
    out = torch.empty_like(x)
    per_item, items = item_rows(rows, hidden * chosen, team.threads)
    team.launch(
        combine_item, items, items > 1, _COMBINE, parts.data_ptr(), places.data_ptr(),
        weights.data_ptr(), out.data_ptr(), rows, per_item, hidden, chosen,
        x.dtype == torch.bfloat16,
    )  # fmt: skip
    return out
