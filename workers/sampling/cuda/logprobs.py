"""Log-probabilities of tokens, and of the best ones beside them, from the model's own logits.

    keep            before the logits are edited: a copy, the maximum of every tile, sums of exp
    reduce_shard    after sampling: of this rank's tokens the k best, and the token's logit
    (all_gather)
    count_above     this rank's tokens with a higher logit than the sampled one
    (all_gather)
    merge           the record of ipc/plan.py's result, but for request and position

The k best come out of a tournament: the best tile by its maximum, its best
token, the tile's next maximum, and again.  That is exact, sorts nothing, and
reads k tiles of a row.  Equal logits go by the lower id.  Rows that ask for no
logprobs are left at once by every kernel, so a graph can hold them all.

Positions of a prompt are scored by the same kernels, without the copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ....ipc.plan import LOGPROB_WORDS, MAX_TOP_LOGPROBS
from ...parallel.communicator import DeviceCommunicator

_TILE = 512
_TILES_PER_PROGRAM = 8

# A rank's part of a row: [best logit, sum of exp, logit of the token, 0, logits, ids].
_TOP = tl.constexpr(MAX_TOP_LOGPROBS)
_TOP_LANES = tl.constexpr(32)
_PART_HEAD = tl.constexpr(4)
_PART = tl.constexpr(_PART_HEAD.value + 2 * MAX_TOP_LOGPROBS)
_RECORD = tl.constexpr(LOGPROB_WORDS)
_RECORD_HEAD = tl.constexpr(4)
_MINUS_INF = tl.constexpr(-0x00800000)
"""The bits of a float32 -inf."""
assert LOGPROB_WORDS == 4 + 2 * MAX_TOP_LOGPROBS, "the records are laid out for this"


@triton.jit
def _asked(row, slots, asks, SCORES: tl.constexpr):
    """0, or 1 + how many best tokens row `row` asks for; rows of a prompt ask for all."""
    if SCORES:
        asked = tl.full([], _TOP + 1, tl.int32)
    else:
        asked = tl.load(asks + tl.load(slots + row))
    return tl.minimum(asked, _TOP + 1)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _load_float(address, mask, other):
    return tl.load(address, mask=mask, other=other).to(tl.float32, bitcast=True)


@triton.jit
def keep(
    logits, copy, slots, asks, tile_max, sums, above, row_stride, width, tiles, programs,
    TILE: tl.constexpr, TILES: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """Program (r, p): the p-th TILES tiles of row r.  sums: [rows, programs, 2] float32."""
    row = tl.program_id(0)
    program = tl.program_id(1)
    if _asked(row, slots, asks, SCORES) > 0:
        tile = program * TILES + tl.arange(0, TILES)
        token = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
        there = token < width
        z = tl.load(
            logits + row.to(tl.int64) * row_stride + token, mask=there, other=-float("inf")
        ).to(tl.float32)
        if not SCORES:
            tl.store(copy + row.to(tl.int64) * width + token, z, mask=there)
        best = tl.max(z, 1)
        tl.store(tile_max + row * tiles + tile, best, mask=tile < tiles)
        highest = tl.max(best, 0)
        each = tl.where(z > -float("inf"), tl.exp(z - highest), 0.0)
        at = sums + (row * programs + program) * 2
        tl.store(at, highest)
        tl.store(at + 1, tl.sum(tl.sum(each, 1), 0))
        if program == 0:
            tl.store(above + row, 0)


@triton.jit
def reduce_shard(
    logits, slots, asks, tokens, tile_max, sums, parts, row_stride, first_id, width, tiles,
    programs, TILE: tl.constexpr, TILES: tl.constexpr, PROGRAMS: tl.constexpr,
    SCORES: tl.constexpr,
):  # fmt: skip
    """One program a row: its part.  parts: [rows, _PART] int32.  TILES, PROGRAMS: powers of 2."""
    row = tl.program_id(0)
    asked = _asked(row, slots, asks, SCORES)
    if asked > 0:
        part = parts + row * _PART
        z_row = logits + row.to(tl.int64) * row_stride
        i = tl.arange(0, PROGRAMS)
        at = sums + (row * programs + i) * 2
        high = tl.load(at, mask=i < programs, other=-float("inf"))
        share = tl.load(at + 1, mask=i < programs, other=0.0)
        highest = tl.max(high, 0)
        local = tl.load(tokens + row) - first_id
        own = tl.load(z_row + local, mask=(local >= 0) & (local < width), other=-float("inf"))
        scaled = tl.where(high > -float("inf"), share * tl.exp(high - highest), 0.0)
        tl.store(part, _bits(highest))
        tl.store(part + 1, _bits(tl.sum(scaled, 0)))
        tl.store(part + 2, _bits(own.to(tl.float32)))
        tl.store(part + 3, 0)

        lane = tl.arange(0, _TOP_LANES)
        unused = (lane >= asked - 1) & (lane < _TOP)
        lowest = tl.full([_TOP_LANES], -float("inf"), tl.float32)
        tl.store(part + _PART_HEAD + lane, _bits(lowest), mask=unused)
        tl.store(part + _PART_HEAD + _TOP + lane, -1, mask=unused)
        index = tl.arange(0, TILES)
        there = index < tiles
        best = tl.load(tile_max + row * tiles + index, mask=there, other=-float("inf"))
        last = tl.full([], float("inf"), tl.float32)
        last_token = tl.full([], -1, tl.int32)
        for j in range(asked - 1):
            tile = tl.argmax(best, 0)
            token = tile * TILE + tl.arange(0, TILE)
            z = tl.load(z_row + token, mask=token < width, other=-float("inf")).to(tl.float32)
            z = tl.where((z < last) | ((z == last) & (token > last_token)), z, -float("inf"))
            last = tl.max(z, 0)
            last_token = tile * TILE + tl.argmax(z, 0)
            left = tl.where(token == last_token, -float("inf"), z)
            best = tl.where(index == tile, tl.max(left, 0), best)
            tl.store(part + _PART_HEAD + j, _bits(last))
            is_there = last > -float("inf")
            tl.store(part + _PART_HEAD + _TOP + j, tl.where(is_there, last_token + first_id, -1))


@triton.jit(do_not_specialize=["rank_stride"])
def count_above(
    logits, slots, asks, tile_max, parts, above, row_stride, width, tiles, rank_stride, ranks,
    TILE: tl.constexpr, TILES: tl.constexpr, RANKS: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """Program (r, p) adds to above [rows] int32 those of its TILES tiles.  parts: all ranks'."""
    row = tl.program_id(0)
    if _asked(row, slots, asks, SCORES) > 0:
        rank = tl.arange(0, RANKS)
        part = parts + rank * rank_stride + row * _PART
        own = tl.max(_load_float(part + 2, rank < ranks, _MINUS_INF), 0)
        count = tl.full([], 0, tl.int32)
        for i in range(TILES):
            tile = tl.program_id(1) * TILES + i
            best = tl.load(tile_max + row * tiles + tile, mask=tile < tiles, other=-float("inf"))
            if best > own:
                token = tile * TILE + tl.arange(0, TILE)
                at = logits + row.to(tl.int64) * row_stride + token
                z = tl.load(at, mask=token < width, other=-float("inf")).to(tl.float32)
                count += tl.sum((z > own).to(tl.int32), 0)
        if count > 0:
            tl.atomic_add(above + row, count, sem="relaxed")


@triton.jit(do_not_specialize=["rank_stride", "rows"])
def merge(
    slots, asks, parts, above, records, rank_stride, rows, ranks,
    RANKS: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """One program a row: records [rows, LOGPROB_WORDS] int32.  parts, above: all ranks'."""
    row = tl.program_id(0)
    asked = _asked(row, slots, asks, SCORES)
    if asked > 0:
        record = records + row * _RECORD
        rank = tl.arange(0, RANKS)
        there = rank < ranks
        part = parts + rank * rank_stride + row * _PART
        high = _load_float(part, there, _MINUS_INF)
        share = _load_float(part + 1, there, 0)
        highest = tl.max(high, 0)
        scaled = tl.where(high > -float("inf"), share * tl.exp(high - highest), 0.0)
        normal = highest + tl.log(tl.sum(scaled, 0))
        own = tl.max(_load_float(part + 2, there, _MINUS_INF), 0)
        higher = tl.sum(tl.load(above + rank * rows + row, mask=there, other=0), 0)
        tl.store(record + 2, _bits(own - normal))
        tl.store(record + 3, higher + 1)

        # Ranks in their order, each one's best first: the first of equals has the lowest id.
        lane = tl.arange(0, RANKS * _TOP_LANES)
        which = lane // _TOP_LANES
        place = lane % _TOP_LANES
        listed = (which < ranks) & (place < _TOP)
        at = parts + which * rank_stride + row * _PART + _PART_HEAD + place
        z = _load_float(at, listed, _MINUS_INF)
        ids = tl.load(at + _TOP, mask=listed, other=-1)
        top = tl.arange(0, _TOP_LANES)
        unused = (top >= asked - 1) & (top < _TOP)
        lowest = tl.full([_TOP_LANES], -float("inf"), tl.float32)
        tl.store(record + _RECORD_HEAD + top, -1, mask=unused)
        tl.store(record + _RECORD_HEAD + _TOP + top, _bits(lowest), mask=unused)
        for j in range(asked - 1):
            best = tl.argmax(z, 0)
            value = tl.max(z, 0)
            token = tl.sum(tl.where(lane == best, ids, 0), 0)
            tl.store(record + _RECORD_HEAD + j, tl.where(value > -float("inf"), token, -1))
            tl.store(record + _RECORD_HEAD + _TOP + j, _bits(value - normal))
            z = tl.where(lane == best, -float("inf"), z)


class Logprobs:
    """Scratch and launches for up to max_rows sampling rows and max_scores scored ones.

    `width` tokens from first_id on are this rank's.
    records, score_records: [max_rows], [max_scores] x LOGPROB_WORDS int32, of the last
    finish() and score(); request and position are left to the reader.
    """

    def __init__(
        self,
        max_rows: int,
        max_scores: int,
        width: int,
        first_id: int,
        communicator: DeviceCommunicator,
        device: torch.device | str,
    ) -> None:
        self._communicator = communicator
        self._width = width
        self._first_id = first_id
        self._tiles = triton.cdiv(width, _TILE)
        self._programs = triton.cdiv(self._tiles, _TILES_PER_PROGRAM)
        most = max(max_rows, max_scores)

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def floats(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self._copy = floats(max_rows, width)
        self._tile_max = floats(most, self._tiles)
        self._sums = floats(most, self._programs, 2)
        self._above = ints(most)
        self._parts = ints(most, _PART.value)
        if communicator.size > 1:
            self._all_parts = ints(communicator.size * most * _PART.value)
            self._all_above = ints(communicator.size * most)
        self.records = ints(max_rows, LOGPROB_WORDS)
        self.score_records = ints(max_scores, LOGPROB_WORDS)

    def keep(self, logits: torch.Tensor, slots: torch.Tensor, asks: torch.Tensor) -> None:
        """Remembers what finish() needs of logits [B, width] before they are edited.

        slots: int32 [B].  asks: int32 by slot, TAKE_LOGPROBS.
        """
        self._keep(logits, slots, asks, scores=False)

    def finish(self, slots: torch.Tensor, asks: torch.Tensor, tokens: torch.Tensor) -> None:
        """After keep() of the same rows: records of the tokens int32 [B] that were sampled."""
        rows = slots.shape[0]
        self._finish(self._copy[:rows], slots, asks, tokens, self.records, scores=False)

    def score(self, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        """score_records of the tokens int32 [B] under logits [B, width]; the 20 best of each."""
        # No row looks at a slot; the kernels are given something to point at.
        self._keep(logits, tokens, tokens, scores=True)
        self._finish(logits, tokens, tokens, tokens, self.score_records, scores=True)

    def _keep(
        self, logits: torch.Tensor, slots: torch.Tensor, asks: torch.Tensor, scores: bool
    ) -> None:
        rows, width = logits.shape
        if width != self._width or logits.stride(1) != 1 or rows > len(self._above):
            raise ValueError(
                f"logits {tuple(logits.shape)} of strides {logits.stride()} do not fit "
                f"{len(self._above)} rows of {self._width} contiguous tokens"
            )
        if rows:
            keep[(rows, self._programs)](
                logits, self._copy, slots, asks, self._tile_max, self._sums, self._above,
                logits.stride(0), width, self._tiles, self._programs,
                TILE=_TILE, TILES=_TILES_PER_PROGRAM, SCORES=scores, num_warps=8,
            )  # fmt: skip

    def _finish(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        asks: torch.Tensor,
        tokens: torch.Tensor,
        records: torch.Tensor,
        scores: bool,
    ) -> None:
        rows, ranks = logits.shape[0], self._communicator.size
        if not rows:
            return
        given = (slots, asks)
        shape = (self._width, self._tiles)
        reduce_shard[(rows,)](
            logits, *given, tokens, self._tile_max, self._sums, self._parts, logits.stride(0),
            self._first_id, *shape, self._programs, TILE=_TILE,
            TILES=triton.next_power_of_2(self._tiles),
            PROGRAMS=triton.next_power_of_2(self._programs), SCORES=scores,
        )  # fmt: skip
        parts, above = self._parts, self._above
        if ranks > 1:
            parts = self._all_parts[: ranks * rows * _PART.value].view(ranks, rows, _PART.value)
            self._communicator.all_gather(self._parts[:rows], parts)
        ranked = {"RANKS": triton.next_power_of_2(ranks), "SCORES": scores}
        rank_stride = rows * _PART.value
        count_above[(rows, self._programs)](
            logits, *given, self._tile_max, parts, above, logits.stride(0), *shape,
            rank_stride, ranks, TILE=_TILE, TILES=_TILES_PER_PROGRAM, **ranked,
        )  # fmt: skip
        if ranks > 1:
            above = self._all_above[: ranks * rows].view(ranks, rows)
            self._communicator.all_gather(self._above[:rows], above)
        merge[(rows,)](
            *given, parts, above, records, rank_stride, rows, ranks, **ranked, num_warps=1
        )
