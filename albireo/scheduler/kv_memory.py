"""Where the keys and values of requests are: in the cache's blocks, in host memory, nowhere.

    find      what of a request can be used that is there already: blocks of the
              prefix cache, and what was swapped out
    seat      gives it a slot's blocks, with what was found in them
    swap_out  keeps its beginning in host memory, when it leaves
    name      makes full blocks known to the prefix cache

What one plan copies is read before its step writes anything, and what it
copies from is not given away before its result: blocks that a copy names and
nobody holds otherwise are pinned until then.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from albireo.ipc.config import blocks_for
from albireo.ipc.plan import COPY_BLOCK, COPY_IN, COPY_OUT, NOTHING, Int32Array

from .blocks import BlockPool, BlockStack, BlockTables, Slots
from .draft import Draft
from .limits import Limits
from .prefix_cache import extend_names, next_name, root_name
from .requests import Request
from .sequences import Sequences


class Found(NamedTuple):
    """What of a request is there, and what it takes to seat it.

    tokens: its first ones, whose keys and values need not be computed.
    shared: the blocks of the prefix cache that hold them.
    copied: a block of the cache to be copied to the one after these; -1 = none.
    swapped: host blocks to be copied to those after these.
    queried, hit: tokens that the prefix cache was asked for, and that it had.
    blocks: that the pool loses by it, of those it could give away.
    """

    tokens: int
    shared: list[int]
    copied: int
    swapped: Int32Array
    queried: int
    hit: int
    blocks: int


class _Pinned(NamedTuple):
    """Held until the result of `step`: KV blocks and host blocks."""

    step: int
    blocks: Int32Array
    host: Int32Array


class KVMemory:
    """The blocks of one group."""

    def __init__(self, limits: Limits) -> None:
        self._block_size = limits.block_size
        self._caching = limits.prefix_caching
        self.pool = BlockPool(limits.num_blocks)
        self.host = BlockStack(limits.num_swap_blocks)
        self.tables = BlockTables(
            self.pool, limits.num_slots, limits.max_model_len, limits.block_size
        )
        self._places = np.arange(limits.block_size)
        self._pinned: deque[_Pinned] = deque()
        # Full blocks of the plan that is being made: the next one can share them.
        self._planned: dict[bytes, int] = {}

    # ------------------------------------------------------------ coming
    def find(self, request: Request, room: int, copies_left: int) -> Found | None:
        """What there is of a waiting request; None: the next plan will find more.

        That is so when the block it lacks first is being filled by this plan.
        room: blocks that it may cost.
        """
        size, length = self._block_size, len(request.tokens)
        # The last token is computed in any case, for its logits; so are those still to be scored.
        most = request.unscored if request.scores else length - 1
        shared: list[int] = []
        last = -1
        if self._caching:
            names = self._names(request)[: blocks_for(most + 1, size) + 1]
            shared = self.pool.cache.blocks(names)
            following = len(shared) + 1
            if following < len(names) and names[following] in self._planned:
                return None
            if len(shared) * size > most:
                last = shared.pop()
        hit = len(shared) * size
        wanted = blocks_for(length, size) - len(shared)
        blocks = wanted + self.pool.idle(shared)
        swapped, copied = NOTHING, -1
        if request.host is not None and request.swapped > hit:
            swapped = request.host[len(shared) : blocks_for(request.swapped, size)]
        elif last >= 0 and hit < most and copies_left:
            with_copy = blocks + self.pool.idle([last])
            if with_copy <= room:
                blocks, copied, hit = with_copy, last, most
        return Found(
            tokens=request.swapped if len(swapped) else hit,
            shared=shared,
            copied=copied,
            swapped=swapped,
            queried=0 if request.scores or not self._caching else length,
            hit=hit,
            blocks=blocks,
        )

    def _names(self, request: Request) -> list[bytes]:
        """The request's names, up to date with its tokens."""
        if not request.names:
            request.names.append(root_name(request.cache_salt))
        extend_names(request.names, request.tokens, self._block_size)
        return request.names

    def seat(self, slot: int, request: Request, found: Found, draft: Draft, step: int) -> None:
        """Gives an empty slot all blocks that the request's tokens need, in the plan of `step`."""
        shared = len(found.shared)
        source = NOTHING
        if found.copied >= 0:
            source = np.array([found.copied], dtype=np.int32)
            self.pool.share([found.copied])
        self.tables.reserve(slot, len(request.tokens), found.shared)
        blocks = self.tables.blocks(slot)
        if len(source):
            draft.add_copies(COPY_BLOCK, source, blocks[shared : shared + 1])
        if len(found.swapped):
            target = blocks[shared : shared + len(found.swapped)]
            draft.add_copies(COPY_IN, found.swapped, target)
            self.fill(slot, request, shared * self._block_size, found.tokens)
        if found.tokens:
            there = blocks_for(found.tokens, self._block_size)
            draft.add_append(slot, np.arange(there), blocks[:there])
        host = NOTHING if request.host is None else request.host
        request.host = None
        if len(source) or len(host):
            self._pinned.append(_Pinned(step, source, host))

    def fill(self, slot: int, request: Request, start: int, end: int) -> None:
        """The plan that is being made fills these positions of a slot with known tokens."""
        if not self._caching:
            return
        first, end = start // self._block_size, end // self._block_size
        blocks = self.tables.table[slot, first:end].tolist()
        self._planned.update(zip(request.names[first + 1 : end + 1], blocks, strict=True))

    # ------------------------------------------------------------ being there
    def planned(self) -> None:
        """The plan is made: what it fills can be shared from the next one on."""
        if self._planned:
            self.pool.cache.add(self._planned.items())
            self._planned.clear()

    def name_filled(self, seq: Sequences, slots: Slots, lengths: Int32Array) -> None:
        """Names the block that each of these slots has filled with its last token but one.

        lengths: [n] int32, tokens that are known.  The last of them may not be
        computed yet; those before it are, as they have results.
        """
        if not self._caching:
            return
        full = (lengths - 1) % self._block_size == 0
        if not full.any():
            return
        slots, index = slots[full], (lengths[full] - 1) // self._block_size - 1
        columns = index[:, None] * self._block_size + self._places
        data = seq.tokens[slots[:, None], columns].tobytes()
        width = len(data) // len(slots)
        blocks = self.tables.table[slots, index]
        begin, filled = 0, []
        for slot, at, block in zip(slots.tolist(), index.tolist(), blocks.tolist(), strict=True):
            names = seq.occupant(slot).names
            if len(names) == at + 1:  # Else a chunk has filled it.
                name = next_name(names[at], data[begin : begin + width])
                names.append(name)
                filled.append((name, block))
            begin += width
        self.pool.cache.add(filled)

    def distrust(self, slot: int) -> None:
        """Nobody is to share what this slot has computed from now on."""
        self.pool.cache.drop(self.tables.blocks(slot).tolist())

    # ------------------------------------------------------------ going
    def swap_out(self, slot: int, request: Request, computed: int, draft: Draft) -> int:
        """Copies the blocks of a slot's `computed` positions to host memory; returns how many.

        As many as fit from the first on.  The caller lets the slot go with the
        plan's result, not before.
        """
        count = min(blocks_for(computed, self._block_size), draft.copies_left, self.host.free)
        if not count:
            return 0
        request.host = self.host.take(count)
        request.swapped = min(computed, count * self._block_size)
        draft.add_copies(COPY_OUT, self.tables.blocks(slot)[:count], request.host)
        return count

    def forget(self, request: Request) -> None:
        """Frees what a request that has ended holds in host memory."""
        if request.host is not None:
            self.host.give(request.host)
            request.host = None

    def completed(self, step: int) -> None:
        """The result of a step is there: lets go of what was pinned for it."""
        while self._pinned and self._pinned[0].step <= step:
            _, blocks, host = self._pinned.popleft()
            self.pool.give(blocks)
            self.host.give(host)

    def check(self) -> None:
        """Raises RuntimeError unless every block is where it should be."""
        self.tables.check(pinned.blocks for pinned in self._pinned)
