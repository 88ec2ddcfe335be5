"""KV blocks: which are free, and which slot holds which.

Blocks are numbers below `num_blocks`; the memory behind them is the workers'.
The scheduler alone hands them out.  Invariant: every block is either on the
free stack or in exactly one slot's table, once.  Nothing here knows of steps:
the scheduler calls `release` when the last step that uses a slot is done.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from albireo.ipc.plan import Int32Array

Slots = npt.NDArray[np.intp]
"""Slot numbers, as numpy indexes with them without a conversion."""


def blocks_for(positions: int, block_size: int) -> int:
    """Blocks that hold so many positions."""
    return -(-positions // block_size)


class BlockPool:
    """The free blocks, as a stack in an array: the last freed are the next given."""

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

    def reserve(self, slot: int, positions: int) -> None:
        """Gives an empty slot the blocks for its first `positions` positions."""
        count = blocks_for(positions, self.block_size)
        self.table[slot, :count] = self.pool.take(count)
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

    def release(self, slot: int) -> None:
        """Frees all blocks of a slot."""
        self.pool.give(self.table[slot, : self.count[slot]])
        self.count[slot] = 0
        self.capacity[slot] = 0

    def check(self) -> None:
        """Raises RuntimeError unless every block is free or in one table, once."""
        held = [row[:count] for row, count in zip(self.table, self.count.tolist(), strict=True)]
        blocks = np.concatenate([self.pool.free_blocks(), *held])
        seen = np.bincount(blocks, minlength=self.pool.num_blocks)
        if len(seen) != self.pool.num_blocks or (seen != 1).any():
            wrong = np.flatnonzero(seen != 1)[:8].tolist()
            raise RuntimeError(f"blocks {wrong} are lost or held twice; {self.pool.free} are free")
