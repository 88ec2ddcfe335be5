"""What a device has to offer: the operations that layers are written with.

One object a worker process, made by `kernels.create`.  `cpu/` implements it
with machine code from numba, `cuda/` with Triton and cuBLAS.  Tensors are on
`device`, activations in the model's dtype (bfloat16 or
float32), row-major and contiguous; T is the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..engine.batch import StepBatch

Zeros = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
"""Makes a tensor of zeros, by its shape and dtype, on the kernels' device."""


@dataclass(slots=True)
class KVLayer:
    """The paged cache of one layer on one rank.

    keys, values: [num_blocks, kv_heads, ...] in the layout the kernels of the
    device like best; only they look inside.
    wide: room for one layer's numbers, common to layers, where kernels unpack them for prompts.
    """

    keys: torch.Tensor
    values: torch.Tensor
    wide: KVLayer | None = None


class Kernels(Protocol):
    """See the module; every method is free of side effects unless it says otherwise."""

    device: torch.device
    """Where weights, caches and activations are: pack_linear and new_kv_layer put them there."""
    batch_invariant: bool
    """A row's result does not depend on the other rows of the call."""

    def warm_up(self) -> None:
        """Compiles, or loads from the disk, all that the other methods run. Starts no threads.

        Called before the workers are forked, so that they inherit machine code.
        """
        ...

    def set_threads(self, threads: int) -> None:
        """Threads that share the work of a call from now on.

        Without it: torch.get_num_threads() at the first call of the process;
        a forked child starts anew.
        """
        ...

    def loading(self, threads: int) -> AbstractContextManager[None]:
        """Around calls of fetch(): a GPU's take buffers, and so many threads to fill them."""
        ...

    def fetch(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` on `device`: itself where it is there already, else a copy.

        It may be a view of a mapped file, which has been read then where a copy is made.
        """
        ...

    def pack_linear(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype | None = None,
        gated: bool = False,
    ) -> Any:
        """A weight [n, k], contiguous, in the layout `linear` wants. Starts no threads.

        A copy: `weight` and `bias` may be views of a mapped file and are not kept.
        gated: in that of `gated_linear`, and for nothing else.
        out_dtype: of linear's result where it is not the model's dtype, such as
        float32 logits of a bfloat16 head.
        """
        ...

    def linear(self, x: torch.Tensor, packed: Any) -> torch.Tensor:
        """[T, k] -> [T, n]: x @ weight.T + bias."""
        ...

    def gated_linear(self, x: torch.Tensor, packed: Any, activation: str) -> torch.Tensor:
        """[T, k] -> [T, n / 2]: linear(x) = gate | up, then f(gate) * up.

        activation: of f, "silu" or "gelu", as in silu_mul and gelu_mul.
        """
        ...

    def reads(self, packed: Any, rows: int) -> torch.Tensor | None:
        """What of the weight `linear` reads for so many rows, where fetching it early can help."""
        ...

    def embed(self, tokens: torch.Tensor, table: torch.Tensor, first_id: int) -> torch.Tensor:
        """int32 [T] -> [T, hidden]; zeros for ids outside first_id .. first_id+len(table)-1."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """[T, hidden] -> [T, hidden], computed in float32; weight [hidden] float32."""
        ...

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        inner: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """residual += x (in place), then rms_norm(residual, weight, eps).

        inner: weight of a norm of x before it is added, rms_norm(x, inner, eps).
        """
        ...

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
        """qkv [T, (heads + 2 kv_heads) * head_dim] -> rotated queries [T, heads, head_dim].

        Normalises each head of q and k first where q_norm / k_norm [head_dim]
        float32 are given (Qwen3, Gemma 3); rotates halves (the Hugging Face convention) by
        rope [max_len, head_dim] float32 = cos | sin, each head_dim/2 wide;
        writes keys and values into `kv` at batch.kv_index.
        """
        ...

    def attention(
        self, q: torch.Tensor, kv: KVLayer, batch: StepBatch, scale: float, window: int
    ) -> torch.Tensor:
        """Causal attention of q [T, heads, head_dim] over the paged cache -> [T, heads * head_dim].

        Row i of a sequence at position p sees keys 0..p (the last `window`
        of them where window > 0).  Nothing beyond the context is read into
        the result, whatever a reused block holds.
        """
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[T, 2m] = gate | up -> silu(gate) * up [T, m]."""
        ...

    def gelu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """The same with gelu(gate), in its approximation by tanh."""
        ...

    def pack_experts(self, weights: Iterable[torch.Tensor], count: int) -> Any:
        """`count` weights [n, k] of one shape, contiguous, in the layout `experts` wants.

        A copy, as pack_linear's; they are taken one by one.
        """
        ...

    def experts(
        self,
        x: torch.Tensor,
        scores: torch.Tensor,
        gate_up: Any,
        down: Any,
        chosen: int,
        normalise: bool,
    ) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]: sum of weight * down(silu_mul(gate_up(x))) over experts.

        scores [T, experts] float32 are the router's: a row's experts are those of
        its `chosen` highest, the first of equals; their weights are the softmax of
        all scores, or (normalise) of theirs alone.
        """
        ...

    def new_kv_layer(
        self, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype,
        zeros: Zeros | None = None,
    ) -> KVLayer:  # fmt: skip
        """An empty cache of one layer; zeros: makes its tensors, where it is given."""
        ...
