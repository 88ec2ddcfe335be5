"""KV blocks: who holds which, and which can be given away.

Blocks are numbers below `num_blocks`; the memory behind them is the workers'.
The scheduler alone hands them out.  A block is in one of three states:

    held    `refs` of it are above 0: so many slots' tables and pins have it
    idle    nobody holds it, but the prefix cache knows its content: it is given
            away when nothing else is left, the one that was let go first
    free    neither, on the stack

Nothing here knows of steps: a block is let go when the last step that uses it
is done, and that is for the caller to know.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from albireo.ipc.config import blocks_for
from albireo.ipc.plan import Int32Array

from .prefix_cache import PrefixCache

Slots = npt.NDArray[np.intp]
"""Slot numbers, as numpy indexes with them without a conversion."""


class BlockStack:
    """Free blocks, as a stack in an array: the last given back are the next taken."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free = num_blocks
        self._stack: Int32Array = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)

    def take(self, count: int) -> Int32Array:
        """Takes `count` blocks: int32 [count].  The caller has looked at `free` before."""
        if count > self.free:
            raise RuntimeError(f"{count} blocks are wanted, {self.free} are free")
        self.free -= count
        return self._stack[self.free : self.free + count].copy()

    def give(self, blocks: Int32Array) -> None:
        """Gives blocks back."""
        if self.free + len(blocks) > self.num_blocks:
            raise RuntimeError(
                f"{len(blocks)} blocks come back to {self.free} free ones of {self.num_blocks}"
            )
        self._stack[self.free : self.free + len(blocks)] = blocks
        self.free += len(blocks)

    def free_blocks(self) -> Int32Array:
        """The free blocks, a view."""
        return self._stack[: self.free]


class BlockPool:
    """The KV blocks, shared by counting.

    refs: [num_blocks] int32, holders of each block.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.cache = PrefixCache(num_blocks)
        self.refs: Int32Array = np.zeros(num_blocks, dtype=np.int32)
        self._stack = BlockStack(num_blocks)
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Blocks that can be taken: the free and the idle."""
        return self._stack.free + len(self._idle)

    @property
    def cached(self) -> int:
        """Those of them that the prefix cache knows."""
        return len(self._idle)

    def take(self, count: int) -> Int32Array:
        """Takes `count` blocks for one holder: int32 [count]; the cache forgets idle ones for it.

        The caller has looked at `free` before.
        """
        missing = count - self._stack.free
        if missing > 0:
            if count > self.free:
                raise RuntimeError(f"{count} blocks are wanted, {self.free} are free")
            oldest = self._idle.popitem
            evicted = [oldest(last=False)[0] for _ in range(missing)]
            self.cache.drop(evicted)
            self._stack.give(np.array(evicted, dtype=np.int32))
        blocks = self._stack.take(count)
        self.refs[blocks] = 1
        return blocks

    def share(self, blocks: list[int]) -> None:
        """One holder more for each of these blocks, which are held or idle."""
        self.refs[blocks] += 1
        for block in blocks:
            self._idle.pop(block, None)

    def give(self, blocks: Int32Array) -> None:
        """A holder lets go of these blocks, each once; of a sequence, in its order.

        Its end is forgotten before its start, which more can share.
        """
        refs = self.refs[blocks] - 1
        if (refs < 0).any():
            wrong = blocks[refs < 0][:8].tolist()
            raise RuntimeError(f"blocks {wrong} come back, but nobody holds them")
        self.refs[blocks] = refs
        unused = blocks[refs == 0]
        if not len(self.cache):
            self._stack.give(unused)
            return
        idle, nameless = self.cache.named(unused[::-1].tolist())
        self._idle.update(dict.fromkeys(idle))
        if nameless:
            self._stack.give(np.array(nameless, dtype=np.int32))

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of these nobody holds."""
        return sum(block in self._idle for block in blocks)

    def check(self, holders: Int32Array) -> None:
        """Raises RuntimeError unless every block is free, idle, or held as often as it should be.

        holders: int32, each block once for each of its holders.
        """
        held = np.bincount(holders, minlength=self.num_blocks)
        idle = np.fromiter(self._idle, dtype=np.int32)
        spare = np.concatenate([self._stack.free_blocks(), idle])
        seen = np.bincount(spare, minlength=self.num_blocks) + (held > 0)
        wrong = np.flatnonzero((seen != 1) | (held != self.refs))[:8].tolist()
        wrong += [block for block in self._idle if block not in self.cache]
        if wrong:
            raise RuntimeError(f"blocks {wrong} are lost or held wrongly; {self.free} are free")


class BlockTables:
    """The blocks of each slot, in the order of the positions they hold.

    table: [slots, blocks of the longest sequence] int32, the first `count[slot]`
    entries of a row are valid.  capacity: [slots] int32, positions that the
    slot's blocks hold.
    """

    def __init__(self, pool: BlockPool, slots: int, max_model_len: int, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        longest = blocks_for(max_model_len, block_size)
        self.table: Int32Array = np.zeros((slots, longest), dtype=np.int32)
        self.count: Int32Array = np.zeros(slots, dtype=np.int32)
        self.capacity: Int32Array = np.zeros(slots, dtype=np.int32)

    def reserve(self, slot: int, positions: int, shared: list[int]) -> None:
        """Gives an empty slot the blocks for its first `positions` positions.

        shared: the first of them, which become one holder richer; the others are taken.
        """
        count = blocks_for(positions, self.block_size)
        if shared:
            self.pool.share(shared)
            self.table[slot, : len(shared)] = shared
        self.table[slot, len(shared) : count] = self.pool.take(count - len(shared))
        self.count[slot] = count
        self.capacity[slot] = count * self.block_size

    def grow(self, slots: Slots) -> tuple[Int32Array, Int32Array]:
        """One block more for each of these slots: (index in its table, block), int32 [n] each."""
        blocks = self.pool.take(len(slots))
        index = self.count[slots]
        self.table[slots, index] = blocks
        self.count[slots] += 1
        self.capacity[slots] += self.block_size
        return index, blocks

    def blocks(self, slot: int) -> Int32Array:
        """The blocks of a slot, a view."""
        return self.table[slot, : self.count[slot]]

    def sole(self, slot: int) -> int:
        """Blocks that nobody but this slot holds: what its end makes free."""
        return int((self.pool.refs[self.blocks(slot)] == 1).sum())

    def release(self, slot: int) -> None:
        """Lets go of all blocks of a slot."""
        self.pool.give(self.blocks(slot))
        self.count[slot] = 0
        self.capacity[slot] = 0

    def check(self, pinned: Iterable[Int32Array] = ()) -> None:
        """Raises RuntimeError unless the pool's counts are those of the tables and the pins."""
        held = [row[:count] for row, count in zip(self.table, self.count.tolist(), strict=True)]
        self.pool.check(np.concatenate([*held, *pinned]))
