"""The "vocab" mode: every rank reduces its shard of each row, and only little is exchanged.

Greedy and plain rows need the shards' winners, 16 bytes a row; filtered rows their best
tokens too (candidates.py).  Both exchanges have sizes that do not depend on the data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from .arithmetic import TILE
from .candidates import (
    MAX_CANDIDATES,
    MESSAGE_WORDS,
    decide_filtered,
    list_best,
    outline,
    pack,
)
from .draw import WINNER_WORDS, decide
from .row_kernels import RowKernels, Rows

if TYPE_CHECKING:
    from ...parallel.communicator import DeviceCommunicator

_ROOM = 2048
"""Tokens of a shard from which the best are taken: some tiles have many of them."""


class ShardSampler:
    """Of up to max_rows rows, of which this rank has the `width` tokens from first_id on."""

    def __init__(
        self,
        max_rows: int,
        width: int,
        first_id: int,
        communicator: DeviceCommunicator,
        device: torch.device,
    ) -> None:
        size = communicator.size
        self._communicator = communicator
        self._width = width
        self._first_id = first_id
        self._kernels = RowKernels(max_rows, width, 1, first_id, device)
        # All tiles together reach only the lowest of their maxima, and a shard has few of them.
        self._most = max(1, min(MAX_CANDIDATES, self._kernels.tiles * 9 // 10))

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._winners = ints(max_rows, WINNER_WORDS)
        self._all_winners = ints(size * max_rows * WINNER_WORDS)
        self._listed_tokens = ints(max_rows, _ROOM)
        self._listed_logits = torch.zeros(max_rows, _ROOM, device=device)
        self._masses = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._message = ints(max_rows, MESSAGE_WORDS)
        self._messages = ints(size * max_rows * MESSAGE_WORDS)

    def sample(self, rows: Rows, out: torch.Tensor, full: bool, filtered: bool) -> None:
        """out: tokens, -1, or UNDECIDED, which only filtered rows can be."""
        mixed = full and filtered
        count, size = rows.length, self._communicator.size
        self._kernels.scan(rows, draws=full, mixed=mixed)
        self._kernels.winner(rows, self._winners[:count], not full, filtered=False, mixed=mixed)
        winners = self._all_winners[: size * count * WINNER_WORDS].view(size, count, -1)
        self._communicator.all_gather(self._winners[:count], winners)
        tables, ranks = rows.tables, triton.next_power_of_2(size)
        if not mixed:
            decide[(count,)](
                winners, rows.slots, rows.positions, tables.temperature, tables.seed, out, count,
                size, RANKS=ranks, GREEDY=not full, num_warps=1, **self._kernels.overlap,
            )  # fmt: skip
            return
        self._pack(rows, winners)
        messages = self._messages[: size * count * MESSAGE_WORDS].view(size, count, -1)
        self._communicator.all_gather(self._message[:count], messages)
        decide_filtered[(count,)](
            winners, messages, messages.view(torch.int64), rows.slots, rows.positions,
            tables.temperature, *rows.filters, tables.seed, out, count, size, size * self._width,
            RANKS=ranks, MOST=MAX_CANDIDATES, **self._kernels.overlap,
        )  # fmt: skip

    def _pack(self, rows: Rows, winners: torch.Tensor) -> None:
        """The filtered rows' messages."""
        kernels, tables, count = self._kernels, rows.tables, rows.length
        size = self._communicator.size
        state = (kernels.floats, kernels.ints, self._masses)
        listed = (self._listed_logits, self._listed_tokens)
        outline[(count,)](
            kernels.tile_max, rows.slots, tables.temperature, *rows.filters, *state,
            kernels.tiles, self._most, TILES=kernels.tiles_power, **kernels.overlap,
        )  # fmt: skip
        grid, per_program = kernels.grid(count)
        list_best[grid](
            rows.logits, kernels.tile_max, rows.slots, tables.temperature, tables.top_k,
            tables.top_p, winners, *state, *listed, self._first_id, self._width,
            rows.strides[0], kernels.tiles, count, size, size * self._width, TILE=TILE,
            TILES_PER_PROGRAM=per_program, ROOM=_ROOM, RANKS=triton.next_power_of_2(size),
            **kernels.overlap,
        )  # fmt: skip
        pack[(count,)](
            *listed, *state, self._message, self._message.view(torch.int64), ROOM=_ROOM,
            MOST=MAX_CANDIDATES, num_warps=8, **kernels.overlap,
        )  # fmt: skip
