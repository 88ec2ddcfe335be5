"""What kernels of some formats need, known without PyTorch: a node decides before it forks."""

from __future__ import annotations

import importlib.util

CAPABILITY = (9, 0)
"""CUDA's, of Hopper."""
MULTIPROCESSORS = 132
"""Of the GPU that layers are cut up for: H100 SXM and H200."""
COLUMNS = 64
"""Of k in a stage of the GEMMs of CUDA C++ (hopper.py)."""
_E4M7_OUTPUTS = 16
E4M7_HEAD_DIMS = (64, 128, 256)
"""Of a KV cache in 12 bits: a quarter of a head is what the tensor cores take at once, or more."""


def can_be_e4m7(n: int, k: int) -> bool:
    """Whether a weight [n, k] can have 12 bits (e4m7.py), by its shape."""
    return n % _E4M7_OUTPUTS == 0 and k % COLUMNS == 0


def has_bindings() -> bool:
    """Whether there is what compiles kernels of CUDA C++."""
    # Of a package in one that is not there, find_spec() raises.
    return all(importlib.util.find_spec(name) is not None for name in ("cuda", "cuda.bindings"))
