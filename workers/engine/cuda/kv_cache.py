"""The paged KV cache of a rank, of as many blocks as its GPU has memory for.

Who knows what there is room for when everything else has its own?  So the layers
have addresses for all blocks that could be of use (EngineConfig.num_blocks), and at
first memory for few: enough for the worst steps, whose time and memory do not
depend on what a block holds, and for the graphs, which keep the addresses.  Then
fill() gives the cache what is left.  With a size that was asked for there is
nothing to find out.

One block more than the scheduler knows, the scratch block, is the last that has
memory: padding writes there.
"""

from __future__ import annotations

import torch

from ....ipc.config import EngineConfig
from ...kernels.cuda.growing import GrowingMemory
from ...kernels.interface import Kernels
from ...models.config import ModelConfig
from .memory import GpuMemoryError, MemoryAccount

_FIRST_BLOCKS = 63
_GIB = 1 << 30


class KvCache:
    """layers: by number.  num_blocks: that the scheduler may use.  Raises GpuMemoryError."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, engine: EngineConfig, account: MemoryAccount
    ) -> None:
        self._engine = engine
        self._account = account
        most = self.num_blocks = engine.num_blocks
        part = f"a KV cache of {most} blocks"
        if engine.gpu_memory_utilization:
            self.num_blocks = min(most, _FIRST_BLOCKS)
            part = f"the first {self.num_blocks} blocks of the KV cache"
        with account.taking(part):
            self._memory = GrowingMemory(kernels.device, self.num_blocks + 1)
            self.layers = [
                kernels.new_kv_layer(
                    most + 1,
                    engine.block_size,
                    config.num_kv_heads // engine.tp,
                    config.head_dim,
                    getattr(torch, engine.dtype),
                    self._memory.zeros,
                )
                for _ in range(config.num_layers)
            ]

    @property
    def scratch_block(self) -> int:
        """Moves when the cache is filled."""
        return self.num_blocks

    def fill(self) -> None:
        """Takes what is left of the memory that the worker may have.

        Raises GpuMemoryError where that does not hold the longest request.
        """
        engine, account, memory = self._engine, self._account, self._memory
        if not engine.gpu_memory_utilization:
            return
        left = account.left_of(engine.gpu_memory_utilization) + memory.nbytes(memory.rows)
        num_blocks = min(engine.num_blocks, max(0, memory.rows_in(left) - 1))
        if num_blocks < engine.blocks_of_longest:
            raise GpuMemoryError(self._too_few(num_blocks, left))
        with account.taking(f"a KV cache of {num_blocks} blocks"):
            memory.grow(num_blocks + 1)
        self.num_blocks = num_blocks

    def _too_few(self, num_blocks: int, left: int) -> str:
        engine = self._engine
        room = num_blocks * engine.block_size
        shorter = f"lower --max-model-len to {room}, " if room else ""
        smaller = "--e4m7-weights off, " if engine.e4m7_weights == "beside" else ""
        has = f"leaves {left / _GIB:.2f} GiB" if left >= 0 else f"is {-left / _GIB:.2f} GiB short"
        return (
            f"{self._account.describe()}. With --gpu-memory-utilization "
            f"{engine.gpu_memory_utilization:g} that {has} for the KV cache, {num_blocks} blocks "
            f"of {engine.block_size} tokens ({self._memory.row_bytes / 1024:.0f} KiB each), "
            f"but one request of {engine.max_model_len} tokens needs {engine.blocks_of_longest}: "
            f"{shorter}{smaller}raise --gpu-memory-utilization, lower --max-num-seqs or "
            "--max-num-batched-tokens, or spread the model over more GPUs with --groups"
        )
