"""Whether weights have 12 bits (workers/kernels/cuda/e4m7.py): what the user asked for, decided."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from albireo.ipc.config import ModelInfo

from .gpus import Gpu
from .options import NodeOptions, OptionError

_CAPABILITY, _CORES = (9, 0), 132 * 128
"""What the kernels are cut up for (workers/kernels/cuda/hopper.py)."""
_BITS, _ALL_BITS = 12, 16
_LEAST_SHARE = 0.2
"""Of the memory that a group may use: more than this the copies are not worth to the KV cache."""


def e4m7_bytes(model: ModelInfo, tp: int) -> int:
    """Of a rank's weights in 12 bits."""
    return model.linear_params * _BITS // 8 // tp


def spared_bytes(model: ModelInfo, tp: int) -> int:
    """Of the same weights in bfloat16."""
    return model.linear_params * _ALL_BITS // 8 // tp


def decide(
    options: NodeOptions, device: str, dtype: str, model: ModelInfo, tp: int, gpus: Sequence[Gpu]
) -> str:
    """ "beside", "only" or "off"; gpus: of the group's ranks.

    Raises OptionError where the user asks for what cannot be.
    """
    asked = options.e4m7_weights
    if asked == "off":
        return asked
    reason = _in_the_way(options, device, dtype, gpus)
    if asked == "auto":
        room = min((gpu.free for gpu in gpus), default=0) * options.gpu_memory_utilization
        worth_it = not reason and e4m7_bytes(model, tp) <= _LEAST_SHARE * room
        return "beside" if worth_it else "off"
    if reason:
        raise OptionError(f"--e4m7-weights {asked} {reason}: leave it out")
    return asked


def _in_the_way(options: NodeOptions, device: str, dtype: str, gpus: Sequence[Gpu]) -> str:
    """What follows the option's name in an error; "" for nothing."""
    if device != "cuda":
        return f"is for GPUs, and --device is {device}"
    if dtype != "bfloat16":
        return f"is for bfloat16, and --dtype is {dtype}"
    if options.batch_invariant:
        return "chooses a kernel by the number of rows, which --batch-invariant forbids"
    for gpu in gpus:
        if gpu.capability != _CAPABILITY:
            has = ".".join(map(str, gpu.capability))
            return f"needs GPUs of compute capability 9.0 (H100, H200), and {gpu.name} has {has}"
        if 0 < gpu.cores < _CORES:
            return f"needs GPUs of {_CORES} cores (H100 SXM, H200), and {gpu.name} has {gpu.cores}"
    if not _has_bindings():
        return "needs the package cuda-bindings, which is not installed"
    return ""


def _has_bindings() -> bool:
    # Of a package in one that is not there, find_spec() raises.
    return all(importlib.util.find_spec(name) is not None for name in ("cuda", "cuda.bindings"))
