"""Rows that are sampled whole although every rank has only a shard of them.

Each rank stores its shards of them in the memory of the rank that samples them
(parallel/peers.py), and that one hands the tokens out the same way.  Whose logits
move is a list on the device, so a graph can hold it: all rows of a step, or those that
the candidates of `vocab` left undecided, for which every kernel leaves at once where
there are none.  Row j of the list goes to rank j % size.

Whoever has read what it was given meets the others before more can come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ...kernels.cuda.overlap import come_up, wait
from .candidates import UNDECIDED
from .row_kernels import RowKernels, Rows

if TYPE_CHECKING:
    from ...parallel.communicator import DeviceCommunicator

_PUSH_BLOCK = 4096
_BLOCK = 256
_LOGIT_BYTES = 4
_ALIGNMENT = 16


@triton.jit(do_not_specialize=["rank", "share"])
def push(
    logits, peers, listed, count, row_stride, width, rank, share,
    SIZE: tl.constexpr, TO_ALL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (j, c): piece c of this rank's shard of row j of the list, to who samples it.

    A rank's memory is [SIZE, share, width]: shards, by where they come from.  ALIGNED: a
    shard is a multiple of 16 bytes.
    """
    come_up(OVERLAP)
    wait(OVERLAP)
    j = tl.program_id(0)
    if j < tl.load(count):
        row = tl.load(listed + j).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(logits + row * row_stride + column, mask=column < width)
        for step in tl.static_range(SIZE if TO_ALL else 1):
            peer = step
            place = rank * share + j
            if not TO_ALL:
                peer = j % SIZE
                place = rank * share + j // SIZE
            theirs = tl.load(peers + peer).to(tl.pointer_type(logits.dtype.element_ty))
            at = theirs + place.to(tl.int64) * width + column
            if ALIGNED:
                # Triton cannot know that of an address: accesses would be an element wide.
                at = tl.multiple_of(at, 16)
            tl.store(at, z, mask=column < width)


@triton.jit(do_not_specialize=["rows", "rank", "share"])
def list_undecided(
    tokens, rows, listed, mine, count, total, rank, share,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program.  listed: rows without a decision; mine [share]: those for this rank, then -1.

    total: int64 [1], of all steps.
    """
    come_up(OVERLAP)
    wait(OVERLAP)
    found = tl.full([], 0, tl.int32)
    for first in range(0, share, BLOCK):
        i = first + tl.arange(0, BLOCK)
        tl.store(mine + i, tl.full([BLOCK], -1, tl.int32), mask=i < share)
    tl.debug_barrier()
    for first in range(0, rows, BLOCK):
        i = first + tl.arange(0, BLOCK)
        undecided = tl.load(tokens + i, mask=i < rows, other=0) == UNDECIDED
        j = found + tl.cumsum(undecided.to(tl.int32), 0) - 1
        tl.store(listed + j, i, mask=undecided)
        tl.store(mine + j // SIZE, i, mask=undecided & (j % SIZE == rank))
        found += tl.sum(undecided.to(tl.int32), 0)
    tl.store(count, found)
    tl.store(total, tl.load(total) + found)


@triton.jit(do_not_specialize=["rows"])
def hand_out(
    tokens, which, rows, peers, SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """One program: tokens [rows] to every rank's, at the step's rows that they are of."""
    come_up(OVERLAP)
    wait(OVERLAP)
    for first in range(0, rows, BLOCK):
        i = first + tl.arange(0, BLOCK)
        at = tl.load(which + i, mask=i < rows, other=-1)
        token = tl.load(tokens + i, mask=i < rows, other=0)
        for peer in tl.static_range(SIZE):
            theirs = tl.load(peers + peer).to(tl.pointer_type(tl.int32))
            tl.store(theirs + at, token, mask=at >= 0)


@triton.jit(do_not_specialize=["rows"])
def take_over(given, listed, count, rows, out, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One program: out of the listed rows, of which there are `count` and at most `rows`."""
    come_up(OVERLAP)
    wait(OVERLAP)
    there = tl.minimum(tl.load(count), rows)
    for first in range(0, there, BLOCK):
        j = first + tl.arange(0, BLOCK)
        row = tl.load(listed + j, mask=j < there, other=0)
        tl.store(out + row, tl.load(given + row, mask=j < there, other=0), mask=j < there)


class WholeRows:
    """Samples rows of up to max_rows together with the other ranks; `width` tokens a shard.

    undecided: int64 [1] on the device, rows that sample_undecided() has sampled.
    """

    def __init__(
        self, max_rows: int, width: int, communicator: DeviceCommunicator, device: torch.device
    ) -> None:
        size, self._rank = communicator.size, communicator.rank
        self._size, self._width = size, width
        self._max_rows = max_rows
        self._share = triton.cdiv(max_rows, size)
        logit_bytes = self._share * size * width * _LOGIT_BYTES
        tokens_at = triton.cdiv(logit_bytes, _ALIGNMENT) * _ALIGNMENT
        self._peers = communicator.peer_memory(tokens_at + max_rows * 4)
        self._token_peers = self._peers.addresses + tokens_at
        self._given = self._peers.mine[tokens_at : tokens_at + max_rows * 4].view(torch.int32)
        self._kernels = RowKernels(self._share, width, size, 0, device)
        self._kernels.add_filters(self._share, device)

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._all = torch.arange(max_rows, dtype=torch.int32, device=device)
        self._mine = torch.arange(self._rank, max_rows, size, dtype=torch.int32, device=device)
        self._many = ints(1).fill_(max_rows)
        self._tokens = ints(self._share)
        self._undecided = ints(max_rows)
        self._my_undecided = ints(self._share)
        self._count = ints(1)
        self.undecided = torch.zeros(1, dtype=torch.int64, device=device)

    def sample_shares(self, rows: Rows, out: torch.Tensor, full: bool, filtered: bool) -> None:
        """Every rank samples the rows rank, rank + size, ..."""
        mine = self._mine[: len(range(self._rank, rows.length, self._size))]
        self._sample(rows, self._all, self._many, mine, out, full, filtered)

    def sample_undecided(self, rows: Rows, out: torch.Tensor) -> None:
        """The same of the rows that are UNDECIDED in out."""
        share = triton.cdiv(rows.length, self._size)
        mine = self._my_undecided[:share]
        list_undecided[(1,)](
            out, rows.length, self._undecided, mine, self._count, self.undecided, self._rank,
            share, SIZE=self._size, BLOCK=_BLOCK, **self._kernels.overlap,
        )  # fmt: skip
        self._sample(rows, self._undecided, self._count, mine, out, True, True)

    def sample_all(self, rows: Rows, out: torch.Tensor, full: bool, filtered: bool) -> None:
        """Every rank samples every row, as many at once as there is room for."""
        for start in range(0, rows.length, self._share):
            which = self._all[start : min(start + self._share, rows.length)]
            self._push(rows, which, self._many, to_all=True)
            self._peers.meet(self._many)
            self._kernels.sample(
                self._received(rows, which), out[start : start + len(which)], full, filtered
            )
            self._peers.meet(self._many)

    def _sample(
        self,
        rows: Rows,
        listed: torch.Tensor,
        count: torch.Tensor,
        mine: torch.Tensor,
        out: torch.Tensor,
        full: bool,
        filtered: bool,
    ) -> None:
        """mine: the step's rows for this rank, of the `count` ones of the list."""
        self._push(rows, listed[: rows.length], count, to_all=False)
        self._peers.meet(count)
        tokens = self._tokens[: len(mine)]
        if len(mine):
            self._kernels.sample(self._received(rows, mine), tokens, full, filtered)
            hand_out[(1,)](
                tokens, mine, len(mine), self._token_peers, SIZE=self._size, BLOCK=_BLOCK,
                **self._kernels.overlap,
            )  # fmt: skip
        self._peers.meet(count)
        take_over[(1,)](
            self._given, listed, count, rows.length, out, BLOCK=_BLOCK, **self._kernels.overlap
        )

    def _push(self, rows: Rows, listed: torch.Tensor, count: torch.Tensor, to_all: bool) -> None:
        push[(len(listed), triton.cdiv(self._width, _PUSH_BLOCK))](
            rows.logits, self._peers.addresses, listed, count, rows.strides[0], self._width,
            self._rank, self._share, SIZE=self._size, TO_ALL=to_all,
            ALIGNED=self._width * rows.logits.element_size() % _ALIGNMENT == 0,
            BLOCK=_PUSH_BLOCK, num_warps=8, **self._kernels.overlap,
        )  # fmt: skip

    def _received(self, rows: Rows, which: torch.Tensor) -> Rows:
        """What the others, and this rank, have stored here, whole."""
        length = self._size * self._share * self._width
        nbytes = length * rows.logits.element_size()
        logits = self._peers.mine[:nbytes].view(rows.logits.dtype)
        strides = (self._width, self._share * self._width)
        return rows._replace(logits=logits, length=len(which), strides=strides, which=which)
