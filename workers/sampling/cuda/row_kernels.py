"""The kernels that make tokens of rows of logits, launched in their order, with their scratch.

A RowKernels is for rows of one shape: this rank's shard of them, or whole rows that lie
in as many pieces as there are ranks.  Which kernels run is fixed by the kind of step.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import triton

from ...kernels.cuda.overlap import overlapped
from .arithmetic import LINE, TILE
from .bound import bound
from .draw import draw, winner
from .filters import collect, finish
from .histogram import histogram, select
from .rows import FLOATS, INTS, LONGS
from .scan import scan

_TILES_PER_SCAN = 8
_FEW_ROWS = 32
_BUCKETS = 2048
_ROOM = 2048
_FEW = 256
_SEARCH_BLOCK = 4096


class SlotParameters(Protocol):
    """Sampling parameters by slot, on the device; 0, 1 and 0 where top_k, top_p, min_p are off."""

    temperature: torch.Tensor
    """float32"""
    top_k: torch.Tensor
    """int32"""
    top_p: torch.Tensor
    """float32"""
    min_p: torch.Tensor
    """float32"""
    seed: torch.Tensor
    """int64, the bits of a uint64"""


class Rows(NamedTuple):
    """What a step samples.  Piece s of row r of the logits is at s * strides[1] + r * strides[0].

    slots, positions: int32, of the step's rows; tables: by slot.  which: int32 [length], the
    step's rows that the logits have, -1 for none; None: all of them.
    """

    logits: torch.Tensor
    length: int
    strides: tuple[int, int]
    slots: torch.Tensor
    positions: torch.Tensor
    tables: SlotParameters
    which: torch.Tensor | None = None

    @property
    def listing(self) -> torch.Tensor:
        """`which`, or something to point at."""
        return self.slots if self.which is None else self.which

    @property
    def filters(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """By slot."""
        return self.tables.top_k, self.tables.top_p, self.tables.min_p


class RowKernels:
    """Scratch, and the launches, for up to max_rows rows of `segments` pieces of `width` tokens."""

    def __init__(
        self, max_rows: int, width: int, segments: int, first_id: int, device: torch.device
    ) -> None:
        self._width = width
        self._segments = segments
        self._first_id = first_id
        self.tiles = segments * triton.cdiv(width, TILE)
        self.tiles_power = triton.next_power_of_2(self.tiles)
        self._grouped = width % 4 == 0 and first_id % 4 == 0
        self.overlap = overlapped(device)

        def scratch(columns: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros((max_rows, columns), dtype=dtype, device=device)

        self.tile_max = scratch(self.tiles, torch.float32)
        self._tile_score = scratch(self.tiles, torch.float32)
        self.floats = scratch(FLOATS.value, torch.float32)
        self.ints = scratch(INTS.value, torch.int32)
        self._longs = scratch(LONGS.value, torch.int64)

    def add_filters(self, max_rows: int, device: torch.device) -> None:
        """Scratch of the filters, for a RowKernels that launches them."""
        self._hist_count = torch.zeros((max_rows, _BUCKETS), dtype=torch.int32, device=device)
        self._hist_mass = torch.zeros((max_rows, _BUCKETS), dtype=torch.int64, device=device)
        self._candidates = torch.zeros((max_rows, _ROOM), dtype=torch.float32, device=device)

    def grid(self, rows: int) -> tuple[tuple[int, int], int]:
        """Of kernels in which most tiles are skipped, and tiles of a program: few programs, but
        enough for the GPU."""
        per_program = 4 if rows < _FEW_ROWS else 16
        return (rows, triton.cdiv(self.tiles, per_program)), per_program

    def sample(self, rows: Rows, out: torch.Tensor, full: bool, filtered: bool) -> None:
        """out: the rows' tokens, int32 [rows.length]; see CudaSampler.sample for full, filtered."""
        filtered = full and filtered
        self.scan(rows, draws=full and not filtered)
        if filtered:
            self._filter(rows)
            self._draw(rows)
        self.winner(rows, out, not full, filtered)

    def scan(self, rows: Rows, draws: bool, mixed: bool = False) -> None:
        """draws: no `draw` follows.  mixed: but not for filtered rows."""
        tables = rows.tables
        scan[(rows.length, triton.cdiv(self.tiles, _TILES_PER_SCAN))](
            rows.logits, self.tile_max, self._tile_score, rows.slots, rows.positions,
            tables.temperature, *rows.filters, tables.seed, rows.listing, self._first_id,
            self._width, *rows.strides, self.tiles, TILE=TILE, LINE=LINE,
            TILES_PER_PROGRAM=_TILES_PER_SCAN, SEGMENTED=self._segments > 1,
            GROUPED=self._grouped, DRAWS=draws, MIXED=mixed, LISTED=rows.which is not None,
            num_warps=8, **self.overlap,
        )  # fmt: skip

    def _filter(self, rows: Rows) -> None:
        """After scan: the thresholds."""
        tables, which, count = rows.tables, rows.listing, rows.length
        state = (self.floats, self.ints, self._longs)
        bins = (self._hist_count, self._hist_mass)
        shape = (self._width, *rows.strides)
        grid, per_program = self.grid(count)
        tiled = {"TILE": TILE, "TILES_PER_PROGRAM": per_program, "BUCKETS": _BUCKETS}
        listed = {"LISTED": rows.which is not None, **self.overlap}
        bound[(count,)](
            self.tile_max, rows.slots, tables.temperature, tables.top_k, tables.top_p,
            *state, *bins, which, self._width * self._segments, self.tiles,
            TILES=self.tiles_power, BUCKETS=_BUCKETS, **listed,
        )  # fmt: skip
        histogram[grid](
            rows.logits, self.tile_max, rows.slots, tables.temperature, *state, *bins,
            which, *shape, self.tiles, **tiled, **listed,
        )  # fmt: skip
        select[(count,)](
            rows.slots, tables.top_p, self.ints, self._longs, *bins, which,
            BUCKETS=_BUCKETS, **listed,
        )  # fmt: skip
        collect[grid](
            rows.logits, self.tile_max, self.floats, self.ints, self._candidates,
            *shape, self.tiles, ROOM=_ROOM, **tiled, **self.overlap,
        )  # fmt: skip
        finish[(count,)](
            rows.logits, rows.slots, tables.temperature, tables.top_p, tables.min_p, *state,
            self._candidates, which, *shape, self._segments, BUCKETS=_BUCKETS, ROOM=_ROOM,
            FEW=min(_FEW, _ROOM), BLOCK=_SEARCH_BLOCK, **listed, num_warps=8,
        )  # fmt: skip

    def _draw(self, rows: Rows) -> None:
        """After _filter."""
        grid, per_program = self.grid(rows.length)
        draw[grid](
            rows.logits, self.tile_max, self._tile_score, self.floats, rows.slots,
            rows.positions, rows.tables.temperature, rows.tables.seed, rows.listing,
            self._first_id, self._width, *rows.strides, self.tiles, TILE=TILE, LINE=LINE,
            TILES_PER_PROGRAM=per_program, GROUPED=self._grouped, LISTED=rows.which is not None,
            **self.overlap,
        )  # fmt: skip

    def winner(
        self, rows: Rows, out: torch.Tensor, greedy: bool, filtered: bool, mixed: bool = False
    ) -> None:
        """After draw, or scan if nothing is filtered.  out: tokens [rows], or winners [rows, 4].

        mixed: filtered rows have no winner, only their best logit.
        """
        winner[(rows.length,)](
            rows.logits, self.tile_max, self._tile_score, self.floats, rows.slots,
            rows.positions, rows.tables.temperature, *rows.filters, rows.tables.seed, out,
            rows.listing, self._first_id, self._width, *rows.strides, self.tiles, TILE=TILE,
            TILES=self.tiles_power, GROUPED=self._grouped, GREEDY=greedy, FILTERED=filtered,
            MIXED=mixed, WHOLE=out.dim() == 1, LISTED=rows.which is not None, **self.overlap,
        )  # fmt: skip
