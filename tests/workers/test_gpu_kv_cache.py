"""How many blocks a GPU's KV cache gets, and what is said where they are too few; without a GPU."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest

from albireo.ipc.config import EngineConfig
from albireo.workers.engine.cuda.kv_cache import KvCache
from albireo.workers.engine.cuda.memory import GpuMemoryError

from .engine_story import CONFIG, CPU_KERNELS, CUDA

MOST = 500
BLOCK = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * CUDA.block_size * 4
SHARED = msgspec.structs.replace(CUDA, num_blocks=MOST, gpu_memory_utilization=0.8)


class Account:
    """In place of a MemoryAccount; blocks: that there is memory for, beside the first."""

    def __init__(self, blocks: float) -> None:
        self._blocks = blocks
        self.taken: list[str] = []

    def left_of(self, utilization: float) -> int:
        assert utilization == 0.8
        return int(self._blocks * BLOCK)

    def taking(self, part: str) -> Any:
        self.taken.append(part)
        return contextlib.nullcontext()

    def describe(self) -> str:
        return "of 80 GiB, 79 were free"


def cache(engine: EngineConfig, blocks: float) -> tuple[KvCache, list[str]]:
    account = Account(blocks)
    return KvCache(CONFIG, CPU_KERNELS, engine, account), account.taken  # type: ignore[arg-type]


def test_a_size_that_is_given_is_there_at_once() -> None:
    kv, taken = cache(CUDA, 0)
    assert kv.num_blocks == kv.scratch_block == CUDA.num_blocks
    kv.fill()
    assert (kv.num_blocks, len(taken)) == (CUDA.num_blocks, 1)
    assert len(kv.layers[0].keys) == CUDA.num_blocks + 1


def test_the_rest_of_the_memory_is_the_caches() -> None:
    kv, taken = cache(SHARED, 200.5)
    first = kv.num_blocks
    assert first < 100
    assert len(kv.layers) == CONFIG.num_layers and len(kv.layers[0].keys) == MOST + 1
    kv.fill()
    # Beside what it had, and one is the scratch block, which it had, too.
    assert kv.num_blocks == kv.scratch_block == first + 200
    assert taken == [
        f"the first {first} blocks of the KV cache",
        f"a KV cache of {first + 200} blocks",
    ]


def test_no_more_than_can_be_of_use() -> None:
    kv, _ = cache(SHARED, 10_000)
    kv.fill()
    assert kv.num_blocks == MOST


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (-80, r"is 0\.\d\d GiB short for the KV cache, 0 blocks .*: raise --gpu"),
        (
            -58,
            r"leaves 0\.00 GiB for the KV cache, 5 blocks .*: lower --max-model-len to 80, ",
        ),
    ],
)
def test_a_cache_that_holds_no_longest_request_is_refused(blocks: int, words: str) -> None:
    engine = msgspec.structs.replace(SHARED, max_model_len=16 * 6)
    kv, _ = cache(engine, blocks)
    said = rf"79 were free\. With --gpu-memory-utilization 0\.8 that {words}"
    with pytest.raises(GpuMemoryError, match=said) as refused:
        kv.fill()
    assert "one request of 96 tokens needs 6" in str(refused.value)
    kv, _ = cache(engine, -57)
    kv.fill()
    assert kv.num_blocks == 6
