"""CUDA's driver itself, for what PyTorch has no call for, or a slow one."""

from __future__ import annotations

import ctypes
import functools


@functools.cache
def libcuda() -> ctypes.CDLL:
    """Raises OSError where there is none."""
    return ctypes.CDLL("libcuda.so.1")
