"""KV blocks that a plan moves before its step: within the cache, and to and from host memory.

On the CPU device host memory is memory like the cache's own: a second KV cache
that no kernel reads.  Taken from the system as it is written.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import numpy.typing as npt
import torch

from ...ipc.plan import COPY_BLOCK, COPY_IN, COPY_OUT
from ..kernels.interface import KVLayer

Int32Array = npt.NDArray[np.int32]

_MEASURED_BLOCKS = 8
_MEASURED_ROUNDS = 5


class BlockCopies:
    """Of one rank; host: a KVLayer for each of kv, of num_swap_blocks blocks, or nothing."""

    def __init__(self, kv: list[KVLayer], host: list[KVLayer]) -> None:
        self._kv = [tensor for layer in kv for tensor in (layer.keys, layer.values)]
        self._host = [tensor for layer in host for tensor in (layer.keys, layer.values)]

    def measure_ns(self) -> int:
        """What a copy to host memory, or back, takes for one block; 0 = there is no host memory.

        Before the first plan: the first blocks are overwritten.
        """
        if not self._host:
            return 0
        count = min(_MEASURED_BLOCKS, len(self._kv[0]), len(self._host[0]))
        blocks = np.arange(count, dtype=np.int32)
        there, back = (
            np.stack([np.full_like(blocks, kind), blocks, blocks], axis=1)
            for kind in (COPY_OUT, COPY_IN)
        )
        taken = []
        for _ in range(_MEASURED_ROUNDS):
            start_ns = time.perf_counter_ns()
            self.apply(there)
            self.apply(back)
            taken.append(time.perf_counter_ns() - start_ns)
        return round(statistics.median(taken) / (2 * count))

    def apply(self, copies: Int32Array) -> None:
        """copies: PlanView.copy.  First what goes out, then what moves, then what comes in.

        Copies of a kind take effect in the plan's order.  Raises ValueError for a
        block that there is not.
        """
        kinds = copies[:, 0]
        for kind, source, target in (
            (COPY_OUT, self._kv, self._host),
            (COPY_BLOCK, self._kv, self._kv),
            (COPY_IN, self._host, self._kv),
        ):
            chosen = copies[kinds == kind, 1:]
            if len(chosen):
                _check(chosen[:, 0], source)
                _check(chosen[:, 1], target)
                for some in _independent(chosen, inside=source is target):
                    _copy(some, source, target)


def _copy(pairs: Int32Array, source: list[torch.Tensor], target: list[torch.Tensor]) -> None:
    come_from, go_to = torch.from_numpy(pairs.T.astype(np.int64))
    for have, get in zip(source, target, strict=True):
        get[go_to] = have[come_from]


def _independent(pairs: Int32Array, inside: bool) -> list[Int32Array]:
    """In parts that can be copied at once: one, but for plans whose order shows."""
    reused = len(np.unique(pairs[:, 1])) < len(pairs)
    if reused or (inside and np.isin(pairs[:, 0], pairs[:, 1]).any()):
        return [pairs[i : i + 1] for i in range(len(pairs))]
    return [pairs]


def _check(blocks: Int32Array, tensors: list[torch.Tensor]) -> None:
    count = len(tensors[0]) if tensors else 0
    if blocks.min() < 0 or blocks.max() >= count:
        wrong = int(blocks[(blocks < 0) | (blocks >= count)][0])
        raise ValueError(
            f"the plan copies block {wrong}, but there are {count}: the scheduler and the worker "
            "disagree"
        )
