"""The numbers of a group's KV cache: as the model's, or in 12 bits."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from albireo.ipc.config import ModelInfo
from albireo.workers.kernels.cuda.needs import E4M7_HEAD_DIMS

from .gpus import Gpu, needs_bfloat16_on_gpu
from .options import NodeOptions, OptionError

_LEAST_CAPABILITY = (8, 0)
"""CUDA's, of the first GPUs with bfloat16."""


def with_kv_cache(
    options: NodeOptions, device: str, dtype: str, model: ModelInfo, gpus: Sequence[Gpu]
) -> ModelInfo:
    """The model, with the bytes of a token that the options ask for.

    Raises OptionError where the cache cannot be so.
    """
    if options.kv_cache_dtype == "auto":
        return model
    reason = _in_the_way(device, dtype, model, gpus)
    if reason:
        raise OptionError(f"--kv-cache-dtype {options.kv_cache_dtype} {reason}: leave it out")
    size = e4m7_kv_bytes(model.kv_bytes_per_token, model.head_dim)
    return msgspec.structs.replace(model, kv_bytes_per_token=size)


def e4m7_kv_bytes(bfloat16_bytes: int, head_dim: int) -> int:
    """Of keys and values that take so many in bfloat16: with a power of two for each head's."""
    return bfloat16_bytes * (3 * head_dim + 4) // (4 * head_dim)


def _in_the_way(device: str, dtype: str, model: ModelInfo, gpus: Sequence[Gpu]) -> str:
    """What follows the option in an error; "" for nothing."""
    if reason := needs_bfloat16_on_gpu(device, dtype):
        return reason
    if model.head_dim not in E4M7_HEAD_DIMS:
        sizes = ", ".join(map(str, E4M7_HEAD_DIMS[:-1]))
        return (
            f"takes heads of {sizes} or {E4M7_HEAD_DIMS[-1]} numbers, and {model.name} has "
            f"heads of {model.head_dim}"
        )
    for gpu in gpus:
        if (0, 0) < gpu.capability < _LEAST_CAPABILITY:
            return f"needs GPUs of compute capability 8.0 (A100), and {gpu.describe_capability()}"
    return ""
