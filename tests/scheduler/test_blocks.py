"""Block pool and block tables."""

from __future__ import annotations

import numpy as np
import pytest

from albireo.ipc.config import blocks_for
from albireo.scheduler.blocks import BlockPool, BlockTables


def tables(num_blocks: int = 8) -> BlockTables:
    return BlockTables(BlockPool(num_blocks), slots=3, max_model_len=20, block_size=4)


def test_blocks_for_rounds_up() -> None:
    assert [blocks_for(positions, 4) for positions in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_a_pool_gives_each_block_once() -> None:
    pool = BlockPool(5)
    first, second = pool.take(2), pool.take(3)
    assert sorted([*first, *second]) == [0, 1, 2, 3, 4]
    assert pool.free == 0
    pool.give(second)
    assert sorted(pool.take(3)) == sorted(second)


def test_what_a_pool_gave_is_not_changed_by_what_comes_back() -> None:
    pool = BlockPool(4)
    taken = pool.take(2)
    before = taken.tolist()
    pool.give(taken[:1])
    pool.take(1)
    assert taken.tolist() == before


def test_a_pool_refuses_what_cannot_be() -> None:
    pool = BlockPool(2)
    with pytest.raises(RuntimeError, match="3 blocks are wanted, 2 are free"):
        pool.take(3)
    with pytest.raises(RuntimeError, match=r"blocks \[0\] come back, but nobody holds them"):
        pool.give(np.array([0], dtype=np.int32))


def test_tables_reserve_grow_and_release() -> None:
    held = tables()
    held.reserve(0, 5, [])
    held.reserve(2, 4, [])
    assert held.count.tolist() == [2, 0, 1]
    assert held.capacity.tolist() == [8, 0, 4]
    index, blocks = held.grow(np.array([2, 0]))
    assert index.tolist() == [1, 2]
    assert held.table[2, 1] == blocks[0]
    assert held.table[0, 2] == blocks[1]
    assert held.pool.free == 3
    held.check()
    held.release(0)
    assert held.pool.free == 6
    assert held.capacity[0] == 0
    held.check()


def test_check_finds_a_block_that_is_held_twice() -> None:
    held = tables()
    held.reserve(0, 4, [])
    held.reserve(1, 4, [])
    held.table[1, 0] = held.table[0, 0]
    with pytest.raises(RuntimeError, match=r"blocks \[0, 1\] are lost or held wrongly"):
        held.check()
