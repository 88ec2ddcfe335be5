"""Kernels: what layers compute with, one implementation for each device.

`create` is all the rest of the worker imports from here; the interface is in
interface.py, the implementations in cpu/ and cuda/.  Importing this package
loads neither torch nor numba nor Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .interface import Kernels


def create(
    device: str, dtype: torch.dtype, batch_invariant: bool, e4m7_weights: str = "off",
    kv_cache_dtype: str = "model",
) -> Kernels:  # fmt: skip
    """The kernels of `device` for activations, weights and KV cache of `dtype`.

    e4m7_weights, kv_cache_dtype: see EngineConfig; of GPUs only.
    Starts no threads, touches no GPU and compiles nothing yet: see Kernels.warm_up.
    Raises ValueError for a device or a dtype without kernels.
    """
    if device == "cpu":
        from .cpu.kernels import CpuKernels

        return CpuKernels(dtype, batch_invariant)
    if device == "cuda":
        return _create_cuda(dtype, batch_invariant, e4m7_weights, kv_cache_dtype)
    raise ValueError(f"no kernels for device {device!r}: there are some for 'cpu' and 'cuda'")


def _create_cuda(
    dtype: torch.dtype, batch_invariant: bool, e4m7_weights: str, kv_cache_dtype: str
) -> Kernels:
    import torch

    try:
        from .cuda.kernels import CudaKernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ValueError(
            "device 'cuda' needs Triton, which comes with PyTorch's CUDA builds: "
            "pip install 'albireo[cuda]'"
        ) from None
    device = torch.device("cuda")
    return CudaKernels(dtype, batch_invariant, device, e4m7_weights, kv_cache_dtype == "e4m7")
