"""How much of a GPU is left for the KV cache, before any worker has run: at most, and about.

    free x utilization              what NVML says is free on the group's fullest GPU
    - weights / tp                  a tied LM head is a table of its own; whole rotary tables;
                                    linear layers in 12 bits, where they have no others
    - copies in 12 bits / tp        of all linear layers, small ones, which have none, included
    - activations                   max_num_batched_tokens x bytes of a token in its widest layer
    - logits                        max_num_seqs x vocabulary / tp, float32: themselves, and what
                                    sampling makes of them
    - context                       CUDA context, kernels, cuBLAS; with tp > 1 the communicators
    - graphs                        what CUDA graphs keep besides the memory of a step, and the
                                    activations of the largest step that one is of

The weights are certain, and what they leave is the most that the cache can have.  The
rest is an estimate, by which is decided whether there is room for copies in 12 bits.
The worker then runs the worst step there can be, captures its graphs, and gives the
cache what all that has really left (workers/engine/cuda/kv_cache.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from albireo.ipc.config import ModelInfo
from albireo.workers.engine.cuda.mixed_sizes import most_rows

from .gpus import Gpu

_GIB = 1 << 30
_CONTEXT_BYTES = 768 << 20
_COMMUNICATOR_BYTES = 512 << 20
_GRAPH_BYTES = 512 << 20
_LOGITS_COPIES = 4
_E4M7_BITS, _BFLOAT16_BITS = 12, 16


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """Bytes on one GPU of the group."""

    gpu: str
    free: int
    utilization: float
    weights: int
    copies: int
    activations: int
    logits: int
    context: int
    graphs: int

    @property
    def kv_bytes(self) -> int:
        """For the KV cache of one rank, about; not below 0."""
        rest = self.copies + self.activations + self.logits + self.context + self.graphs
        return max(0, self._beside_weights - rest)

    @property
    def most_kv_bytes(self) -> int:
        """For the KV cache of one rank, if steps took nothing; not below 0."""
        return max(0, self._beside_weights)

    @property
    def _beside_weights(self) -> int:
        return int(self.free * self.utilization) - self.weights

    def describe(self) -> str:
        """The sum of what is certain, for an error."""
        left = f"leaves {self._beside_weights / _GIB:.2f} GiB for the KV cache and steps"
        if self._beside_weights < 0:
            left = f"is {-self._beside_weights / _GIB:.2f} GiB too much, a KV cache not counted"
        return (
            f"{self.gpu}: {self.free / _GIB:.2f} GiB free x {self.utilization:g} - weights "
            f"{self.weights / _GIB:.2f} {left}"
        )


def e4m7_bytes(model: ModelInfo, tp: int) -> int:
    """Of a rank's weights in 12 bits."""
    return model.e4m7_params.get(tp, 0) * _E4M7_BITS // 8 // tp


def estimate(
    model: ModelInfo,
    tp: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    utilization: float,
    graphs: bool,
    gpus: Sequence[Gpu],
    e4m7_weights: str = "off",
) -> GpuMemory:
    """The sum of the module's table, for the group's GPU with the least free memory."""
    fullest = min(gpus, key=lambda gpu: gpu.free)
    shard = -(-model.vocab_size // tp)
    row_bytes = model.hidden_size * _BFLOAT16_BITS // 8
    mixed = most_rows(model.layer_products, tp, max_num_batched_tokens, row_bytes)
    captured = max(mixed, max_num_seqs)
    weights = (model.loaded_bytes or model.weight_bytes) // tp + model.rope_bytes
    if e4m7_weights == "only":
        weights += e4m7_bytes(model, tp) - model.e4m7_params.get(tp, 0) * _BFLOAT16_BITS // 8 // tp
    return GpuMemory(
        gpu=fullest.name,
        free=fullest.free,
        utilization=utilization,
        weights=weights,
        copies=e4m7_bytes(model, tp) if e4m7_weights == "beside" else 0,
        activations=max_num_batched_tokens * model.activation_bytes_per_token,
        logits=_LOGITS_COPIES * max_num_seqs * shard * 4,
        context=_CONTEXT_BYTES + (_COMMUNICATOR_BYTES if tp > 1 else 0),
        graphs=_GRAPH_BYTES + captured * model.activation_bytes_per_token if graphs else 0,
    )
