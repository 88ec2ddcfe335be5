"""Collectives between real processes: the same bits everywhere, and named absentees."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from albireo.ipc.shared_memory import create
from albireo.workers.parallel.communicator import Communicator, SingleRank
from albireo.workers.parallel.shared import SharedMemoryCommunicator, shared_bytes, slab_bytes
from albireo.workers.parallel.slabs import CollectiveMismatch, CollectiveTimeout

MAX_TOKENS, HIDDEN, MAX_ROWS, VOCAB = 40, 576, 8, 3000
WAIT_S = 20.0

Arrays = dict[str, npt.NDArray[np.generic]]
Work = Callable[[Communicator], Arrays]


def new_memory(size: int) -> int:
    return create("test", shared_bytes(size, MAX_TOKENS, HIDDEN, MAX_ROWS, VOCAB))


def connect(
    memfd: int, rank: int, size: int, timeout_s: float = WAIT_S, spin_us: int = 0
) -> SharedMemoryCommunicator:
    max_bytes = slab_bytes(size, MAX_TOKENS, HIDDEN, MAX_ROWS, VOCAB)
    return SharedMemoryCommunicator(memfd, rank, size, max_bytes, timeout_s, spin_us)


def run_ranks(directory: Path, size: int, work: Work, spin_us: int = 0) -> list[Arrays]:
    """Runs `work` on every rank, a process each; returns their arrays in the order of the ranks."""
    memfd = new_memory(size)
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                # The parent's OpenMP threads do not exist here.
                torch.set_num_threads(1)
                arrays = work(connect(memfd, rank, size, spin_us=spin_us))
                np.savez(directory / f"{rank}.npz", **arrays)  # type: ignore[arg-type]
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    os.close(memfd)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * size
    results = []
    for rank in range(size):
        with np.load(directory / f"{rank}.npz", allow_pickle=False) as arrays:
            results.append(dict(arrays))
    return results


def contribution(rank: int, k: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What a rank brings to its k-th all_reduce: large and small values, where order matters."""
    generator = torch.Generator().manual_seed(1000 * k + rank)
    x = torch.randn(shape, generator=generator)
    return (x * 10.0 ** torch.randint(-3, 4, shape, generator=generator)).to(dtype)


def bits(x: torch.Tensor) -> npt.NDArray[np.generic]:
    return x.contiguous().view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32).numpy()


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_reduce_adds_in_rank_order_with_the_same_bits_everywhere(
    tmp_path: Path, size: int, dtype: torch.dtype
) -> None:
    shapes = [(1, HIDDEN), (MAX_TOKENS, HIDDEN), (1, 1), (3, 77)]

    def work(communicator: Communicator) -> Arrays:
        arrays: Arrays = {}
        for k in range(40):
            x = contribution(communicator.rank, k, shapes[k % len(shapes)], dtype)
            communicator.all_reduce(x)
            arrays[str(k)] = bits(x)
        return arrays

    results = run_ranks(tmp_path, size, work)
    for k in range(40):
        shards = [contribution(rank, k, shapes[k % len(shapes)], dtype) for rank in range(size)]
        total = shards[0].float()
        for shard in shards[1:]:
            total = total + shard.float()
        for result in results:
            assert np.array_equal(result[str(k)], bits(total.to(dtype)))


@pytest.mark.parametrize(("size", "spin_us"), [(2, 0), (3, 0), (3, 100)])
def test_ranks_of_any_speed_read_what_was_meant_for_this_step(
    tmp_path: Path, size: int, spin_us: int
) -> None:
    """Ranks pause at random, also while they read shared logits: slabs are not reused too early."""
    steps, rows, width = 150, 5, VOCAB // size

    def logits(rank: int, step: int) -> npt.NDArray[np.float32]:
        return np.arange(rows * width, dtype=np.float32).reshape(rows, width) + rank * 7 + step

    def work(communicator: Communicator) -> Arrays:
        rank = communicator.rank
        pauses = random.Random(rank)

        def maybe_pause() -> None:
            if pauses.random() < 0.05:
                time.sleep(pauses.uniform(0, 0.002))

        for step in range(steps):
            x = torch.full((2, HIDDEN), float(step + rank))
            communicator.all_reduce(x)
            maybe_pause()
            shards = communicator.share_logits(torch.from_numpy(logits(rank, step)))
            maybe_pause()
            for peer in range(size):
                assert np.array_equal(shards[peer], logits(peer, step))
            mine = np.array([step, rank, -step], np.int32)
            gathered = communicator.all_gather_int32(mine)
            maybe_pause()
            assert gathered.tolist() == [[step, peer, -step] for peer in range(size)]
            assert torch.all(x == size * step + sum(range(size)))
        return {"done": np.array(True)}

    assert all(result["done"] for result in run_ranks(tmp_path, size, work, spin_us))


def test_gathered_ids_stay_after_later_collectives(tmp_path: Path) -> None:
    def work(communicator: Communicator) -> Arrays:
        first = communicator.all_gather_int32(np.array([communicator.rank], np.int32))
        for k in range(5):
            communicator.all_gather_int32(np.array([100 + k], np.int32))
        return {"first": first}

    for result in run_ranks(tmp_path, 2, work):
        assert result["first"].tolist() == [[0], [1]]


def test_inside_inference_mode_and_on_logits_that_are_not_contiguous(tmp_path: Path) -> None:
    def work(communicator: Communicator) -> Arrays:
        with torch.inference_mode():
            x = torch.ones(3, 4)
            communicator.all_reduce(x)
            shard = torch.arange(12.0).view(4, 3).T + communicator.rank
            shards = communicator.share_logits(shard)
        return {"x": x.numpy(), "own": shard.numpy(), "shared": shards[communicator.rank].copy()}

    for result in run_ranks(tmp_path, 2, work):
        assert (result["x"] == 2).all()
        assert np.array_equal(result["own"], result["shared"])


# ------------------------------------------------------------ what goes wrong
def test_a_rank_that_never_came_is_named() -> None:
    memfd = new_memory(3)
    ranks = [connect(memfd, rank, 3, timeout_s=0.05) for rank in (0, 1)]
    with pytest.raises(CollectiveTimeout) as caught:
        ranks[0].all_reduce(torch.zeros(1, HIDDEN))
    text = str(caught.value)
    assert text.startswith("rank 0 waited 0.050 s at collective 1, all_reduce of 2304 bytes, for ")
    assert f"rank 1 (pid {os.getpid()}; at collective 0)" in text
    assert "rank 2 (never attached; at collective 0)" in text
    with pytest.raises(CollectiveTimeout, match=r", for rank 2 \(never attached"):
        ranks[1].all_reduce(torch.zeros(1, HIDDEN))  # rank 0 has arrived: only 2 is missing


def test_a_rank_that_died_is_named_as_dead() -> None:
    memfd = new_memory(2)
    started = os.pipe()
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        other = connect(memfd, 1, 2)
        os.write(started[1], b".")
        other.all_gather_int32(np.zeros(1, np.int32))
        signal.pause()
    os.read(started[0], 1)
    communicator = connect(memfd, 0, 2, timeout_s=0.5)
    communicator.all_gather_int32(np.zeros(1, np.int32))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    expected = rf"share_logits of 16 bytes, for rank 1 \(pid {pid}, dead; at collective 1\)"
    with pytest.raises(CollectiveTimeout, match=expected):
        communicator.share_logits(torch.zeros(2, 2))


def test_ranks_that_do_different_things_are_told_so(tmp_path: Path) -> None:
    def work(communicator: Communicator) -> Arrays:
        with pytest.raises(CollectiveMismatch) as caught:
            communicator.all_reduce(torch.zeros(1 + communicator.rank, 8))
        return {"text": np.array(str(caught.value))}

    results = run_ranks(tmp_path, 2, work)
    assert [str(result["text"]) for result in results] == [
        "collective 1: rank 0 does all_reduce of 32 bytes, but rank 1 all_reduce of 64 bytes",
        "collective 1: rank 1 does all_reduce of 64 bytes, but rank 0 all_reduce of 32 bytes",
    ]


def test_what_does_not_fit_is_refused_before_anybody_waits() -> None:
    communicator = connect(new_memory(2), 0, 2)
    limit = slab_bytes(2, MAX_TOKENS, HIDDEN, MAX_ROWS, VOCAB) // 4
    for too_large in (
        lambda: communicator.all_reduce(torch.zeros(limit + 1)),
        lambda: communicator.share_logits(torch.zeros(1, limit + 1)),
        lambda: communicator.all_gather_int32(np.zeros(limit + 1, np.int32)),
    ):
        with pytest.raises(ValueError, match=f"of {limit + 1} 4-byte values exceeds the {limit}"):
            too_large()
    with pytest.raises(ValueError, match="contiguous"):
        communicator.all_reduce(torch.zeros(4, 4).T)
    with pytest.raises(ValueError, match=r"not torch\.float16"):
        communicator.all_reduce(torch.zeros(4, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"not torch\.bfloat16"):
        communicator.share_logits(torch.zeros(4, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="not int64"):
        communicator.all_gather_int32(np.zeros(4, np.int64))


def test_a_communicator_that_cannot_be_is_refused() -> None:
    memfd = new_memory(2)
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        connect(memfd, 2, 2)
    with pytest.raises(ValueError, match="use SingleRank"):
        connect(memfd, 0, 1)
    with pytest.raises(ValueError, match=r"need \d+ bytes of shared memory; descriptor \d+ has 64"):
        connect(create("small", 64), 0, 2)
    connect(memfd, 0, 2)
    with pytest.raises(ValueError, match=rf"rank 0 was taken before \(pid {os.getpid()}\)"):
        connect(memfd, 0, 2)


def test_a_single_rank_has_only_its_own() -> None:
    alone: Communicator = SingleRank()
    assert (alone.rank, alone.size) == (0, 1)
    x = torch.ones(2, 3)
    alone.all_reduce(x)
    assert torch.all(x == 1)
    assert [shard.tolist() for shard in alone.share_logits(x)] == [x.tolist()]
    assert alone.all_gather_int32(np.array([4, 5], np.int32)).tolist() == [[4, 5]]
