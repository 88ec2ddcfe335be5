"""All ranks of a group in the threads of one process, over the shared memory that processes use."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from albireo.ipc.shared_memory import create
from albireo.workers.parallel.communicator import HostCommunicator, SingleRank
from albireo.workers.parallel.shared import SharedMemoryCommunicator, shared_bytes, slab_bytes

T = TypeVar("T")


def on_ranks(
    size: int, max_rows: int, vocab_size: int, work: Callable[[HostCommunicator], T]
) -> list[T]:
    """`work` on every rank at once; the results in the order of the ranks."""
    if size == 1:
        return [work(SingleRank())]
    shape = (size, 1, 64, max_rows, vocab_size)
    memfd = create("test.comm", shared_bytes(*shape))
    ranks = [
        SharedMemoryCommunicator(memfd, rank, size, slab_bytes(*shape), 30.0)
        for rank in range(size)
    ]
    os.close(memfd)
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(work, ranks))
