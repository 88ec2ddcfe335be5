"""The numbers of a group's KV cache: as the model's, or in 12 bits."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from albireo.ipc.config import ModelInfo
from albireo.workers.kernels.cuda.needs import E4M7_HEAD_DIMS

from .gpus import Gpu, needs_bfloat16_on_gpu, needs_cuda_cpp
from .options import NodeOptions, OptionError


def choose_kv_cache(
    options: NodeOptions, device: str, dtype: str, model: ModelInfo, gpus: Sequence[Gpu]
) -> str:
    """ "model" or "e4m7".  Raises OptionError where the user asks for what cannot be.

    auto: e4m7 where it can be, which was measured to be faster.  But batch-invariant rows all go
    the way of prompts, for which the cache is unpacked in every step, and with a few layers the
    room for that is more than 12 bits spare.
    """
    asked = options.kv_cache_dtype
    if asked == "model":
        return asked
    reason = _in_the_way(device, dtype, model, gpus)
    if asked == "auto":
        if reason or options.batch_invariant:
            return "model"
        smaller = with_e4m7_cache(model).kv_room_per_token < model.kv_room_per_token
        return "e4m7" if smaller else "model"
    if reason:
        raise OptionError(f"--kv-cache-dtype {asked} {reason}: leave it out")
    return asked


def with_e4m7_cache(model: ModelInfo) -> ModelInfo:
    """With the bytes of a token in 12 bits, and of one layer in bfloat16, which prompts read."""
    return msgspec.structs.replace(
        model,
        kv_bytes_per_token=e4m7_kv_bytes(model.kv_bytes_per_token, model.head_dim),
        kv_step_bytes_per_token=model.kv_bytes_per_token // model.kv_layers,
    )


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
    return needs_cuda_cpp(gpus)
