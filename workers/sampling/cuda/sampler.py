"""The sampler of a GPU rank: logits of its vocabulary shard to tokens, without a host in between.

The engine calls sample() once a step, in a stream or while a graph is captured;
nothing in it waits, allocates or looks at data.  Three kinds of step, of which
all ranks choose the same by the plan:

    greedy       every row is greedy                  every rank reduces its shard, and the
    plain        no row has top-k, top-p or min-p     ranks exchange 16 bytes a row ("vocab")
    filtered     anything                             logits are transposed: rank r gets rows
                                                      r*n/t .. (r+1)*n/t whole, samples them,
                                                      and the tokens are gathered ("sequence")

On one rank nothing moves.  The tokens are those of the CPU sampler for the same
logits (see arithmetic.py), whatever the kind of step or the number of ranks.
"""

from __future__ import annotations

from typing import Protocol

import torch
import triton

from ...parallel.communicator import DeviceCommunicator, SingleRank
from .arithmetic import LINE, TILE
from .bound import bound
from .draw import WINNER_WORDS, decide, draw, winner
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


class _Rows:
    """Scratch, and the launches, for up to max_rows rows of `segments` pieces of `width` tokens."""

    def __init__(
        self, max_rows: int, width: int, segments: int, first_id: int, device: torch.device
    ) -> None:
        self._width = width
        self._segments = segments
        self._first_id = first_id
        self._tiles = segments * triton.cdiv(width, TILE)
        self._tiles_power = triton.next_power_of_2(self._tiles)
        self._grouped = width % 4 == 0 and first_id % 4 == 0

        def scratch(columns: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros((max_rows, columns), dtype=dtype, device=device)

        self._tile_max = scratch(self._tiles, torch.float32)
        self._tile_score = scratch(self._tiles, torch.float32)
        self._floats = scratch(FLOATS.value, torch.float32)
        self._ints = scratch(INTS.value, torch.int32)
        self._longs = scratch(LONGS.value, torch.int64)

    def add_filters(self, max_rows: int, device: torch.device) -> None:
        """Scratch of the filters, for a _Rows that launches them."""
        self._hist_count = torch.zeros((max_rows, _BUCKETS), dtype=torch.int32, device=device)
        self._hist_mass = torch.zeros((max_rows, _BUCKETS), dtype=torch.int64, device=device)
        self._candidates = torch.zeros((max_rows, _ROOM), dtype=torch.float32, device=device)

    def _grid(self, rows: int, tiles_per_program: int) -> tuple[int, int]:
        return rows, triton.cdiv(self._tiles, tiles_per_program)

    def _tiles_per_program(self, rows: int) -> int:
        """Of kernels in which most tiles are skipped: few programs, but enough for the GPU."""
        return 4 if rows < _FEW_ROWS else 16

    def scan(
        self,
        logits: torch.Tensor,
        rows: int,
        strides: tuple[int, int],
        slots: torch.Tensor,
        positions: torch.Tensor,
        tables: SlotParameters,
        first_row: int,
        draws: bool,
    ) -> None:
        """logits: row r's piece s at s * strides[1] + r * strides[0].  draws: no `draw` follows."""
        scan[self._grid(rows, _TILES_PER_SCAN)](
            logits, self._tile_max, self._tile_score, slots, positions, tables.temperature,
            tables.seed, first_row, slots.shape[0] - 1, self._first_id, self._width, *strides,
            self._tiles, TILE=TILE, LINE=LINE, TILES_PER_PROGRAM=_TILES_PER_SCAN,
            SEGMENTED=self._segments > 1, GROUPED=self._grouped, DRAWS=draws, num_warps=8,
        )  # fmt: skip

    def filter(
        self,
        logits: torch.Tensor,
        rows: int,
        strides: tuple[int, int],
        slots: torch.Tensor,
        tables: SlotParameters,
        first_row: int,
    ) -> None:
        """After scan: the thresholds.  Row i has the parameters of slots[first_row + i]."""
        last_row = slots.shape[0] - 1
        state = (self._floats, self._ints, self._longs)
        bins = (self._hist_count, self._hist_mass)
        shape = (self._width, *strides)
        per_program = self._tiles_per_program(rows)
        grid = self._grid(rows, per_program)
        tiled = {"TILE": TILE, "TILES_PER_PROGRAM": per_program, "BUCKETS": _BUCKETS}
        bound[(rows,)](
            self._tile_max, slots, tables.temperature, tables.top_k, tables.top_p,
            *state, *bins, first_row, last_row, self._width * self._segments, self._tiles,
            TILES=self._tiles_power, BUCKETS=_BUCKETS,
        )  # fmt: skip
        histogram[grid](
            logits, self._tile_max, slots, tables.temperature, *state, *bins,
            first_row, last_row, *shape, self._tiles, **tiled,
        )  # fmt: skip
        select[(rows,)](
            slots, tables.top_p, self._ints, self._longs, *bins, first_row, last_row,
            BUCKETS=_BUCKETS,
        )  # fmt: skip
        collect[grid](
            logits, self._tile_max, self._floats, self._ints, self._candidates,
            *shape, self._tiles, ROOM=_ROOM, **tiled,
        )  # fmt: skip
        finish[(rows,)](
            logits, slots, tables.temperature, tables.top_p, tables.min_p, *state,
            self._candidates, first_row, last_row, *shape, self._segments,
            BUCKETS=_BUCKETS, ROOM=_ROOM, FEW=min(_FEW, _ROOM), BLOCK=_SEARCH_BLOCK, num_warps=8,
        )  # fmt: skip

    def draw(
        self,
        logits: torch.Tensor,
        rows: int,
        strides: tuple[int, int],
        slots: torch.Tensor,
        positions: torch.Tensor,
        tables: SlotParameters,
        first_row: int,
    ) -> None:
        """After filter."""
        per_program = self._tiles_per_program(rows)
        draw[self._grid(rows, per_program)](
            logits, self._tile_max, self._tile_score, self._floats, slots, positions,
            tables.temperature, tables.seed, first_row, slots.shape[0] - 1, self._first_id,
            self._width, *strides, self._tiles,
            TILE=TILE, LINE=LINE, TILES_PER_PROGRAM=per_program, GROUPED=self._grouped,
        )  # fmt: skip

    def winner(
        self,
        logits: torch.Tensor,
        rows: int,
        strides: tuple[int, int],
        slots: torch.Tensor,
        positions: torch.Tensor,
        tables: SlotParameters,
        first_row: int,
        out: torch.Tensor,
        greedy: bool,
        filtered: bool,
    ) -> None:
        """After draw, or scan if nothing is filtered.  out: tokens [rows], or winners [rows, 4]."""
        winner[(rows,)](
            logits, self._tile_max, self._tile_score, self._floats, slots, positions,
            tables.temperature, tables.seed, out, first_row, slots.shape[0] - 1, self._first_id,
            self._width, *strides, self._tiles,
            TILE=TILE, TILES=self._tiles_power, GROUPED=self._grouped, GREEDY=greedy,
            FILTERED=filtered, WHOLE=out.dim() == 1,
        )  # fmt: skip


class CudaSampler:
    """Samples up to max_rows rows a step, together with the group's other ranks.

    vocab_size: of all ranks together; first_id: this rank's first token,
    rank * vocab_size / size.  All scratch is made here.
    """

    def __init__(
        self,
        max_rows: int,
        vocab_size: int,
        first_id: int,
        communicator: DeviceCommunicator | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        self._communicator: DeviceCommunicator = communicator or SingleRank()
        rank, size = self._communicator.rank, self._communicator.size
        width, remainder = divmod(vocab_size, size)
        if remainder or first_id != rank * width:
            raise ValueError(
                f"rank {rank} of {size} cannot have the shard from token {first_id} of "
                f"{vocab_size}: shards are {vocab_size}/{size} tokens each"
            )
        device = torch.device(device)
        self._max_rows = max_rows
        self._width = width
        self._per_rank = triton.cdiv(max_rows, size)
        self._shard = _Rows(max_rows, width, 1, first_id, device)
        self._whole = self._shard
        if size > 1:
            self._whole = _Rows(self._per_rank, width, size, 0, device)
            winners = (max_rows, WINNER_WORDS)
            self._mine = torch.zeros(winners, dtype=torch.int32, device=device)
            self._all = torch.zeros((size, *winners), dtype=torch.int32, device=device)
            self._my_tokens = torch.zeros(self._per_rank, dtype=torch.int32, device=device)
            tokens = self._per_rank * size
            self._tokens = torch.zeros(tokens, dtype=torch.int32, device=device)
            self._logits: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}
        self._whole.add_filters(self._per_rank, device)

    def prepare(self, dtype: torch.dtype) -> None:
        """Makes the memory that logits of `dtype` are transposed in; on one rank there is none.

        Without it the first filtered step of that dtype does, which must not be under capture.
        """
        size = self._communicator.size
        if size > 1 and dtype not in self._logits:
            shape = (size, self._per_rank, self._width)
            device = self._tokens.device
            sent, received = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            self._logits[dtype] = (sent, received)

    def sample(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        tables: SlotParameters,
        draw_position: torch.Tensor,
        full: bool,
        out: torch.Tensor,
        filtered: bool = True,
    ) -> None:
        """out[i] (int32) = the token of row i, or -1 where its logits are not finite.

        logits: [B, V / size] float32 or bfloat16, rows contiguous.  slots,
        draw_position, out: int32 [B], contiguous.  full: not every row is
        greedy.  filtered: of the others, some have top-k, top-p or min-p.
        """
        rows = logits.shape[0]
        if rows == 0:
            return
        self._check(logits, slots, draw_position, out)
        if self._communicator.size > 1 and full and filtered:
            self._sample_sequences(logits, slots, tables, draw_position, out)
            return
        whole = self._communicator.size == 1
        strides = (logits.stride(0), 0)
        given = (logits, rows, strides)
        filtered = full and filtered
        self._shard.scan(*given, slots, draw_position, tables, 0, full and not filtered)
        if filtered:
            self._shard.filter(*given, slots, tables, 0)
            self._shard.draw(*given, slots, draw_position, tables, 0)
        found = out if whole else self._mine[:rows]
        self._shard.winner(*given, slots, draw_position, tables, 0, found, not full, filtered)
        if not whole:
            self._decide(rows, slots, tables, draw_position, full, out)

    def _decide(
        self,
        rows: int,
        slots: torch.Tensor,
        tables: SlotParameters,
        draw_position: torch.Tensor,
        full: bool,
        out: torch.Tensor,
    ) -> None:
        """The tokens from all ranks' winners."""
        size = self._communicator.size
        winners = self._all.view(-1)[: size * rows * WINNER_WORDS].view(size, rows, WINNER_WORDS)
        self._communicator.all_gather(self._mine[:rows], winners)
        decide[(rows,)](
            winners, slots, draw_position, tables.temperature, tables.seed, out, rows, size,
            RANKS=triton.next_power_of_2(size), GREEDY=not full, num_warps=1,
        )  # fmt: skip

    def _sample_sequences(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        tables: SlotParameters,
        draw_position: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Every rank samples ceil(B / size) rows over the whole vocabulary."""
        communicator = self._communicator
        rank, size = communicator.rank, communicator.size
        rows = logits.shape[0]
        share = triton.cdiv(rows, size)
        self.prepare(logits.dtype)
        sent, received = self._logits[logits.dtype]
        if rows == share * size and logits.is_contiguous():
            mine = logits
        else:
            # Rows that pad the last share are sampled, and dropped.
            mine = sent.view(-1, self._width)[: share * size]
            mine[:rows].copy_(logits)
        pieces = received.view(-1)[: size * share * self._width].view(size, share, self._width)
        communicator.all_to_all(mine.view(size, share, self._width), pieces)
        given = (pieces, share, (self._width, share * self._width))
        first_row = rank * share
        self._whole.scan(*given, slots, draw_position, tables, first_row, False)
        self._whole.filter(*given, slots, tables, first_row)
        self._whole.draw(*given, slots, draw_position, tables, first_row)
        tokens = self._my_tokens[:share]
        self._whole.winner(*given, slots, draw_position, tables, first_row, tokens, False, True)
        gathered = self._tokens[: share * size]
        communicator.all_gather(tokens, gathered.view(size, share))
        out.copy_(gathered[:rows])

    def _check(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        draw_position: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        rows, width = logits.shape
        if rows > self._max_rows or width != self._width or logits.stride(1) != 1:
            raise ValueError(
                f"logits [{rows}, {width}] of strides {logits.stride()} do not fit a sampler of "
                f"{self._max_rows} rows of {self._width} contiguous tokens"
            )
        for name, x in (("slots", slots), ("draw_position", draw_position), ("out", out)):
            if x.dtype is not torch.int32 or x.shape != (rows,) or not x.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous int32 [{rows}], not {x.dtype} {tuple(x.shape)}"
                )
