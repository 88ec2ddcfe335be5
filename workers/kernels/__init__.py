"""Kernels: what layers compute with, one implementation for each device.

`create` is all the rest of the worker imports from here; the interface is in
interface.py, the CPU's implementation in cpu/.  Importing this package loads
neither torch nor numba.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .interface import Kernels


def create(device: str, dtype: torch.dtype, batch_invariant: bool) -> Kernels:
    """The kernels of `device` for activations, weights and KV cache of `dtype`.

    Starts no threads and compiles nothing yet: see Kernels.warm_up.
    Raises ValueError for a device or a dtype without kernels.
    """
    if device != "cpu":
        raise ValueError(f"no kernels for device {device!r}: this build has them for 'cpu'")
    from .cpu.kernels import CpuKernels

    return CpuKernels(dtype, batch_invariant)
