"""Grouped-query attention over the paged KV cache, with rotary positions.

Heads are split over the ranks, KV heads with them; each rank's cache holds its
own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..engine.batch import StepBatch
from ..kernels.interface import KVLayer
from .linear import ColumnParallelLinear, RowParallelLinear
from .norm import norm_weight
from .rank import Rank
from .rope import RotaryOrder
from .weights import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """heads, kv_heads: of all ranks. window: keys that a token sees, 0 = all.

    rotary_dim: dimensions of a head that rotate. scale: of the scores.
    qk_norm: each head of q and k is normalised; norm_eps: of these norms.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    scale: float
    window: int
    qk_norm: bool
    norm_eps: float


class Attention:
    """[T, hidden] -> [T, hidden], this rank's share of a sum; writes keys and values to the cache.

    rope: [max_len, head_dim] float32, see rope.py.
    """

    def __init__(
        self, weights: Weights, shape: AttentionShape, rope: torch.Tensor, rank: Rank
    ) -> None:
        if shape.rotary_dim < shape.head_dim:
            weights = RotaryOrder(weights, shape.head_dim, shape.rotary_dim)
        self._kernels = rank.kernels
        self._shape = shape
        self._heads = shape.heads // rank.size
        self._kv_heads = shape.kv_heads // rank.size
        self._rope = rope
        self._qkv = ColumnParallelLinear(weights, ("q_proj", "k_proj", "v_proj"), rank)
        self.reads = self._qkv.reads
        self._out = RowParallelLinear(weights, "o_proj", rank)
        self._q_norm = self._k_norm = None
        if shape.qk_norm:
            self._q_norm = norm_weight(weights, "q_norm.weight", rank)
            self._k_norm = norm_weight(weights, "k_norm.weight", rank)

    def __call__(
        self, x: torch.Tensor, batch: StepBatch, kv: KVLayer, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """rows: those whose results are wanted, in this order; None: all."""
        attended = self._kernels.attention(
            self.cache(x, batch, kv), kv, batch, self._shape.scale, self._shape.window
        )
        return self._out(attended if rows is None else attended.index_select(0, rows))

    def cache(self, x: torch.Tensor, batch: StepBatch, kv: KVLayer) -> torch.Tensor:
        """Writes keys and values to the cache; returns the queries, [T, heads, head_dim]."""
        shape = self._shape
        return self._kernels.rope_and_cache(
            self._qkv(x),
            self._heads,
            self._kv_heads,
            shape.head_dim,
            self._q_norm,
            self._k_norm,
            shape.norm_eps,
            self._rope,
            batch,
            kv,
        )
