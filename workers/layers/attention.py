"""Grouped-query attention over the paged KV cache, with rotary positions.

Heads are split over the ranks, KV heads with them; each rank's cache holds its
own.  Qwen3 normalises each head of q and k, if it has the weights for that.
"""

from __future__ import annotations

import torch

from ..engine.batch import StepBatch
from ..kernels.interface import KVLayer
from .linear import ColumnParallelLinear, RowParallelLinear
from .rank import Rank
from .weights import Weights


class Attention:
    """[T, hidden] -> [T, hidden]; writes the step's keys and values into the cache.

    heads, kv_heads: of all ranks.  rope: [max_len, head_dim] float32, see rope.py.
    window: keys that a token sees, 0 = all.
    """

    def __init__(
        self,
        weights: Weights,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
        window: int,
        rope: torch.Tensor,
        rank: Rank,
    ) -> None:
        self._kernels = rank.kernels
        self._heads = heads // rank.size
        self._kv_heads = kv_heads // rank.size
        self._head_dim = head_dim
        self._eps = eps
        self._window = window
        self._rope = rope
        self._qkv = ColumnParallelLinear(weights, ("q_proj", "k_proj", "v_proj"), rank)
        self._out = RowParallelLinear(weights, "o_proj", rank)
        q_norm, k_norm = weights.find("q_norm.weight"), weights.find("k_norm.weight")
        self._q_norm = None if q_norm is None else rank.keep(q_norm)
        self._k_norm = None if k_norm is None else rank.keep(k_norm)

    def __call__(self, x: torch.Tensor, batch: StepBatch, kv: KVLayer) -> torch.Tensor:
        q = self._kernels.rope_and_cache(
            self._qkv(x),
            self._heads,
            self._kv_heads,
            self._head_dim,
            self._q_norm,
            self._k_norm,
            self._eps,
            self._rope,
            batch,
            kv,
        )
        scale = self._head_dim**-0.5
        return self._out(self._kernels.attention(q, kv, batch, scale, self._window))
