"""Whether weights have 12 bits (workers/kernels/cuda/e4m7.py): what the user asked for, decided."""

from __future__ import annotations

from collections.abc import Sequence

from albireo.ipc.config import ModelInfo, blocks_for
from albireo.workers.kernels.cuda.needs import MULTIPROCESSORS

from .gpu_memory import e4m7_bytes, estimate
from .gpus import Gpu, needs_bfloat16_on_gpu, needs_cuda_cpp
from .options import NodeOptions, OptionError

_GIB = 1 << 30
_CORES = MULTIPROCESSORS * 128
_MOST_SHARE = 0.2
"""Of the memory that a group may use: more than this the copies are not worth to the KV cache."""


def decide(
    options: NodeOptions, device: str, dtype: str, model: ModelInfo, tp: int, max_model_len: int,
    batched: int, gpus: Sequence[Gpu],
) -> str:  # fmt: skip
    """ "beside", "only" or "off"; batched: tokens of a step; gpus: of the group's ranks.

    Raises OptionError where the user asks for what cannot be.
    """
    asked = options.e4m7_weights
    if asked == "off":
        return asked
    reason = _in_the_way(options, device, dtype, gpus)
    if asked == "auto":
        worth_it = not reason and _leave_room(options, model, tp, max_model_len, batched, gpus)
        return "beside" if worth_it else "off"
    if reason:
        raise OptionError(f"--e4m7-weights {asked} {reason}: leave it out")
    return asked


def _leave_room(
    options: NodeOptions, model: ModelInfo, tp: int, max_model_len: int, batched: int,
    gpus: Sequence[Gpu],
) -> bool:  # fmt: skip
    """Whether copies are small, and leave the KV cache asked for, or the longest request's."""
    memory = estimate(
        model, tp, options.max_num_seqs, batched, options.gpu_memory_utilization,
        options.cuda_graphs, gpus, "beside",
    )  # fmt: skip
    if e4m7_bytes(model, tp) > _MOST_SHARE * memory.free * memory.utilization:
        return False
    blocks = blocks_for(max_model_len, options.block_size)
    wanted: float = blocks * model.kv_room_per_token * options.block_size
    if options.kv_cache_gib is not None:
        wanted = options.kv_cache_gib * _GIB
    return memory.kv_bytes * tp >= wanted


def _in_the_way(options: NodeOptions, device: str, dtype: str, gpus: Sequence[Gpu]) -> str:
    """What follows the option's name in an error; "" for nothing."""
    if reason := needs_bfloat16_on_gpu(device, dtype):
        return reason
    if options.batch_invariant:
        return "chooses a kernel by the number of rows, which --batch-invariant forbids"
    if reason := needs_cuda_cpp(gpus):
        return reason
    for gpu in gpus:
        if 0 < gpu.cores < _CORES:
            return f"needs GPUs of {_CORES} cores (H100 SXM, H200), and {gpu.name} has {gpu.cores}"
    return ""
