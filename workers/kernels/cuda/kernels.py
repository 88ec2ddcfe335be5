"""The Kernels interface on an NVIDIA GPU: eight or nine launches a layer of a decode step.

    add_rms_norm  linear  rope_and_cache    attention  linear
    add_rms_norm  gated_linear (one or two) linear

Nothing here but loading waits for the GPU or reads from it, and temporaries come from
PyTorch's allocator, so that all of it can be captured in a CUDA graph.  Not
even the constructor touches the GPU: it runs in the fork server.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ...engine.batch import StepBatch
from ..interface import KVLayer, Zeros
from . import paging
from .activation import gated, gelu_mul, silu_mul
from .attention import Attention
from .embedding import embed
from .experts import experts, pack_experts
from .linear import (
    NarrowLinear,
    PackedLinear,
    gated_linear,
    invariant_linear,
    linear,
    pack_linear,
    weight_of,
)
from .norm import rms_norm
from .rope import rope_and_cache
from .staging import Staging, more_threads

_DTYPES = (torch.bfloat16, torch.float32)


class CudaKernels:
    """See interface.Kernels.

    device: where weights and caches go; "cuda" is the process's current device
    at the time.  A CPU device works under Triton's interpreter, for tests.
    e4m7: "beside", "only" or "off", see EngineConfig.e4m7_weights; not with batch_invariant.
    e4m7_cache: the KV cache has 12 bits a number; with bfloat16.  What prompts see of it is
    unpacked into one layer's worth of bfloat16, which layers of one shape share.
    """

    def __init__(
        self, dtype: torch.dtype, batch_invariant: bool, device: torch.device, e4m7: str = "off",
        e4m7_cache: bool = False,
    ) -> None:  # fmt: skip
        if dtype not in _DTYPES:
            names = " and ".join(str(d).removeprefix("torch.") for d in _DTYPES)
            raise ValueError(f"no CUDA kernels for {dtype}: there are some for {names}")
        if e4m7_cache and dtype != torch.bfloat16:
            raise ValueError(f"a KV cache of 12 bits is for bfloat16, and not for {dtype}")
        self.dtype = dtype
        self.batch_invariant = batch_invariant
        self.device = device
        self._e4m7 = "off" if batch_invariant else e4m7
        self._e4m7_cache = e4m7_cache
        self._wide: KVLayer | None = None
        self._staging: Staging | None = None
        self._attention = Attention(batch_invariant)

    def set_threads(self, threads: int) -> None:
        """Nothing to do: threads share the work of the CPU's kernels only."""

    def warm_up(self) -> None:
        """Nothing to do before the fork: kernels compile at a worker's first steps."""

    @contextmanager
    def loading(self, threads: int) -> Iterator[None]:
        if self.device.type != "cuda":
            yield
            return
        with more_threads(threads):
            self._staging = Staging(self.device)
            try:
                yield
            finally:
                self._staging = None

    def fetch(self, weight: torch.Tensor) -> torch.Tensor:
        if self._staging is None or weight.is_cuda:
            return weight.to(self.device)
        return self._staging.fetch(weight)

    def pack_linear(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype | None = None,
        gated: bool = False,
    ) -> PackedLinear | NarrowLinear:
        if weight.dtype != self.dtype:
            raise ValueError(f"a weight of {weight.dtype} for kernels of {self.dtype}")
        return pack_linear(weight, bias, out_dtype, self.device, self._e4m7, gated)

    def linear(self, x: torch.Tensor, packed: PackedLinear | NarrowLinear) -> torch.Tensor:
        if self.batch_invariant:
            assert isinstance(packed, PackedLinear)
            return invariant_linear(x, packed)
        return linear(x, packed)

    def gated_linear(
        self, x: torch.Tensor, packed: PackedLinear | NarrowLinear, activation: str
    ) -> torch.Tensor:
        if self.batch_invariant:
            assert isinstance(packed, PackedLinear)
            return gated(invariant_linear(x, packed), activation)
        return gated_linear(x, packed, activation)

    def reads(self, packed: PackedLinear | NarrowLinear, rows: int) -> torch.Tensor | None:
        return weight_of(packed, rows)

    def embed(self, tokens: torch.Tensor, table: torch.Tensor, first_id: int) -> torch.Tensor:
        return embed(tokens, table, first_id)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return rms_norm(x, None, weight, eps)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        inner: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return rms_norm(x, residual, weight, eps, inner)

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
        return rope_and_cache(qkv, heads, kv_heads, head_dim, q_norm, k_norm, eps, rope, batch, kv)

    def attention(
        self, q: torch.Tensor, kv: KVLayer, batch: StepBatch, scale: float, window: int
    ) -> torch.Tensor:
        return self._attention(q, kv, batch, scale, window)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return silu_mul(gate_up)

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gelu_mul(gate_up)

    def pack_experts(self, weights: Iterable[torch.Tensor], count: int) -> torch.Tensor:
        return pack_experts(weights, count, self.device)

    def experts(
        self,
        x: torch.Tensor,
        scores: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        chosen: int,
        normalise: bool,
    ) -> torch.Tensor:
        return experts(x, scores, gate_up, down, chosen, normalise, self.batch_invariant)

    def new_kv_layer(
        self, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype,
        zeros: Zeros | None = None,
    ) -> KVLayer:  # fmt: skip
        if dtype != self.dtype:
            raise ValueError(f"a KV cache of {dtype} for kernels of {self.dtype}")
        self._attention.prepare(self.device)
        shape = num_blocks, kv_heads, block_size, head_dim
        new = functools.partial(
            paging.new_kv_layer, num_blocks, block_size, kv_heads, head_dim, dtype,
            zeros or self._zeros,
        )  # fmt: skip
        if not self._e4m7_cache:
            return new()
        narrow = new(e4m7=True)
        if self._wide is None or self._wide.keys.shape != shape:
            self._wide = new()
        return replace(narrow, wide=self._wide)

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)
