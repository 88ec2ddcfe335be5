"""Copies of a step's plan or tokens between pinned host memory and the GPU, in one stream.

They are the driver's own calls: PyTorch's copy_ and the views it takes keep the launching
thread for several times as long (docs/late-steps.md).
"""

from __future__ import annotations

import ctypes

import torch

from ...kernels.cuda.libcuda import libcuda

_ADDRESS = ctypes.c_uint64


class StreamCopies:
    """For the threads whose current GPU is the stream's.  Addresses and lengths in bytes.

    Host memory has to be pinned or registered with CUDA: a copy is launched, and not waited for.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        calls = libcuda()
        self._stream = ctypes.c_void_p(stream.cuda_stream)
        self._to_device = calls.cuMemcpyHtoDAsync_v2
        self._to_device.argtypes = (_ADDRESS, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        self._to_host = calls.cuMemcpyDtoHAsync_v2
        self._to_host.argtypes = (ctypes.c_void_p, _ADDRESS, ctypes.c_size_t, ctypes.c_void_p)

    def to_device(self, device: int, host: int, nbytes: int) -> None:
        """Raises RuntimeError when CUDA refuses."""
        _check(self._to_device(device, host, nbytes, self._stream), nbytes, "to")

    def to_host(self, host: int, device: int, nbytes: int) -> None:
        """Raises RuntimeError when CUDA refuses."""
        _check(self._to_host(host, device, nbytes, self._stream), nbytes, "from")


def _check(status: int, nbytes: int, way: str) -> None:
    if status != 0:
        raise RuntimeError(f"a copy of {nbytes} bytes {way} the GPU failed: CUDA error {status}")
