"""The Kernels interface on the CPU: one method, one launch.

Made in the fork server and inherited by the workers: the team of threads is
made at the first call after a fork, with torch.get_num_threads() threads.
All results are the same bits for any batch, so `batch_invariant` changes
nothing here.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch

from ...engine.batch import StepBatch
from ..interface import KVLayer, Zeros
from . import paging
from .activation import gate_item, gelu_mul, silu_mul
from .attention import Attention, attention_bf16, attention_f32
from .embedding import embed, embed_item
from .experts import (
    PackedExperts,
    combine_item,
    experts,
    experts_bf16,
    experts_f32,
    route_item,
)
from .linear import PackedLinear, linear, linear_bf16, linear_f32, pack_linear
from .norm import norm_item, rms_norm
from .rope import rope_and_cache, rope_item
from .threads import Team

_DTYPES = (torch.bfloat16, torch.float32)


class CpuKernels:
    """See interface.Kernels."""

    def __init__(self, dtype: torch.dtype, batch_invariant: bool) -> None:
        if dtype not in _DTYPES:
            names = " and ".join(str(d).removeprefix("torch.") for d in _DTYPES)
            raise ValueError(f"no CPU kernels for {dtype}: there are some for {names}")
        self.dtype = dtype
        self.device = torch.device("cpu")
        self.batch_invariant = batch_invariant
        self._attention = Attention()
        self._made: Team | None = None
        _instances.add(self)

    @property
    def _team(self) -> Team:
        team = self._made
        if team is None:
            team = self._made = Team(torch.get_num_threads())
        return team

    def set_threads(self, threads: int) -> None:
        if self._made is not None:
            self._made.close()
        self._made = Team(threads)

    def warm_up(self) -> None:
        is_bf16 = self.dtype == torch.bfloat16
        for function in (
            embed_item,
            norm_item,
            gate_item,
            rope_item,
            linear_bf16 if is_bf16 else linear_f32,
            route_item,
            experts_bf16 if is_bf16 else experts_f32,
            combine_item,
            attention_bf16 if is_bf16 else attention_f32,
        ):
            _ = function.address

    def loading(self, threads: int) -> AbstractContextManager[None]:
        return nullcontext()

    def fetch(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def pack_linear(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype | None = None,
        gated: bool = False,
    ) -> PackedLinear:
        if weight.dtype != self.dtype:
            raise ValueError(f"a weight of {weight.dtype} for kernels of {self.dtype}")
        return pack_linear(weight, bias, out_dtype)

    def reads(self, packed: PackedLinear, rows: int) -> torch.Tensor | None:
        return None

    def linear(self, x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        return linear(self._team, x, packed)

    def gated_linear(self, x: torch.Tensor, packed: PackedLinear, activation: str) -> torch.Tensor:
        apply = {"silu": self.silu_mul, "gelu": self.gelu_mul}[activation]
        return apply(self.linear(x, packed))

    def embed(self, tokens: torch.Tensor, table: torch.Tensor, first_id: int) -> torch.Tensor:
        return embed(self._team, tokens, table, first_id)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return rms_norm(self._team, x, None, weight, eps)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        inner: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return rms_norm(self._team, x, residual, weight, eps, inner)

    def rope_and_cache(
        self,
        qkv: torch.Tensor,
        heads: int,
        kv_heads: int,
        head_dim: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        rope: torch.Tensor,
        batch: StepBatch,
        kv: KVLayer,
    ) -> torch.Tensor:
        return rope_and_cache(
            self._team, qkv, heads, kv_heads, head_dim, q_norm, k_norm, eps, rope, batch, kv
        )

    def attention(
        self, q: torch.Tensor, kv: KVLayer, batch: StepBatch, scale: float, window: int
    ) -> torch.Tensor:
        return self._attention(self._team, q, kv, batch, scale, window)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return silu_mul(self._team, gate_up)

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gelu_mul(self._team, gate_up)

    def pack_experts(self, weights: Iterable[torch.Tensor], count: int) -> PackedExperts:
        return PackedExperts(weights, count)

    def experts(
        self,
        x: torch.Tensor,
        scores: torch.Tensor,
        gate_up: PackedExperts,
        down: PackedExperts,
        chosen: int,
        normalise: bool,
    ) -> torch.Tensor:
        return experts(self._team, x, scores, gate_up, down, chosen, normalise)

    def new_kv_layer(
        self, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype,
        zeros: Zeros | None = None,
    ) -> KVLayer:  # fmt: skip
        if dtype != self.dtype:
            raise ValueError(f"a KV cache of {dtype} for kernels of {self.dtype}")
        return paging.new_kv_layer(num_blocks, block_size, kv_heads, head_dim, dtype, zeros)


_instances: weakref.WeakSet[CpuKernels] = weakref.WeakSet()


def _forget_team() -> None:
    """In a forked child: its parent's helpers are not here, a new team is due."""
    for kernels in _instances:
        kernels._made = None


os.register_at_fork(after_in_child=_forget_team)
