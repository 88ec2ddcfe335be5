"""The Kernels interface in plain PyTorch: slow, obvious, and what real kernels are tested against.

Works in any floating dtype, on any device PyTorch has; every operation is the
textbook formula, in float32 where the interface says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from albireo.workers.engine.batch import StepBatch
from albireo.workers.kernels.interface import KVLayer


class ReferenceKernels:
    """keys and values of a KVLayer: [num_blocks, block_size, kv_heads, head_dim]."""

    device = torch.device("cpu")
    batch_invariant = False

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
    ) -> Any:
        copied = None if bias is None else bias.float().clone()
        return weight.float().clone(), copied, out_dtype or weight.dtype

    def reads(self, packed: Any, rows: int) -> torch.Tensor | None:
        return None

    def linear(self, x: torch.Tensor, packed: Any) -> torch.Tensor:
        weight, bias, out_dtype = packed
        return F.linear(x.float(), weight, bias).to(out_dtype)

    def embed(self, tokens: torch.Tensor, table: torch.Tensor, first_id: int) -> torch.Tensor:
        local = tokens.long() - first_id
        here = (local >= 0) & (local < len(table))
        rows = table[local.clamp(0, len(table) - 1)]
        return rows * here.unsqueeze(1)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (normed * weight.float()).to(x.dtype)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        inner: torch.Tensor | None = None,
    ) -> torch.Tensor:
        residual += x if inner is None else self.rms_norm(x, inner, eps)
        return self.rms_norm(residual, weight, eps)

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
        parts = qkv.view(len(qkv), -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
        q, k, v = parts
        if q_norm is not None and k_norm is not None:
            q, k = self.rms_norm(q, q_norm, eps), self.rms_norm(k, k_norm, eps)
        angles = rope[batch.positions.long()].unsqueeze(1)
        where = batch.kv_index.long()
        kv.keys.flatten(0, 1)[where] = _rotate(k, angles)
        kv.values.flatten(0, 1)[where] = v
        return _rotate(q, angles)

    def attention(
        self, q: torch.Tensor, kv: KVLayer, batch: StepBatch, scale: float, window: int
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        block_size = kv.keys.shape[1]
        starts = batch.query_start.tolist()
        for i, length in enumerate(batch.context_len.tolist()):
            blocks = batch.block_tables[batch.slots[i]][: -(-length // block_size)].long()
            keys, values = (x[blocks].flatten(0, 1)[:length] for x in (kv.keys, kv.values))
            rows = slice(starts[i], starts[i + 1])
            positions = batch.positions[rows].unsqueeze(1)
            seen = torch.arange(length) <= positions
            if window:
                seen &= torch.arange(length) > positions - window
            out[rows] = _attend(q[rows], keys, values, seen, scale)
        return out.flatten(1)

    def gated_linear(self, x: torch.Tensor, packed: Any, activation: str) -> torch.Tensor:
        gate_up = self.linear(x, packed)
        return self.silu_mul(gate_up) if activation == "silu" else self.gelu_mul(gate_up)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        return F.silu(gate) * up

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        return F.gelu(gate, approximate="tanh") * up

    def pack_experts(self, weights: Iterable[torch.Tensor], count: int) -> Any:
        packed = [weight.float().clone() for weight in weights]
        assert len(packed) == count
        return packed

    def experts(
        self,
        x: torch.Tensor,
        scores: torch.Tensor,
        gate_up: Any,
        down: Any,
        chosen: int,
        normalise: bool,
    ) -> torch.Tensor:
        weights, picks = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
        weights, picks = weights[:, :chosen], picks[:, :chosen]
        if normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x, dtype=torch.float32)
        for row, (row_weights, row_picks) in enumerate(zip(weights, picks, strict=True)):
            for weight, expert in zip(row_weights, row_picks.tolist(), strict=True):
                inner = F.linear(x[row : row + 1].float(), gate_up[expert]).to(x.dtype)
                out[row] += weight * F.linear(self.silu_mul(inner).float(), down[expert])[0]
        return out.to(x.dtype)

    def new_kv_layer(
        self, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> KVLayer:
        shape = (num_blocks, block_size, kv_heads, head_dim)
        return KVLayer(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))


def _rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """x [T, heads, head_dim] by angles [T, 1, head_dim] = cos | sin."""
    cos, sin = angles.chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float
) -> torch.Tensor:
    """q [rows, heads, d], k, v [length, kv_heads, d], seen [rows, length] -> [rows, heads, d]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
