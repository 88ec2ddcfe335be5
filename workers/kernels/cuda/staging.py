"""Weights on their way to the GPU: from mapped files through pinned memory, by several threads.

A copy straight from a mapped file goes through the driver's own staging, by one thread, at a
fraction of what the bus does.  Here PyTorch's threads copy a piece into one buffer, each a
part of it, while the GPU fetches the piece before from the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_BUFFER_BYTES = 16 << 20
_BUFFERS = 2
_SMALL_BYTES = 1 << 20


class Staging:
    """Of the current GPU's current stream, for one thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [
            torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(_BUFFERS)
        ]
        self._fetched = [torch.cuda.Event() for _ in range(_BUFFERS)]
        self._turn = 0

    def fetch(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy on the device, row-major; it is launched, and `weight` is read when this returns.

        weight: of host memory, of any strides.
        """
        out = torch.empty(weight.shape, dtype=weight.dtype, device=self._device)
        if weight.nbytes < _SMALL_BYTES:
            return out.copy_(weight)
        row_bytes = weight.nbytes // len(weight)
        at_once = _BUFFER_BYTES // row_bytes
        if not at_once:
            return out.copy_(weight)
        for to, piece in zip(out.split(at_once), weight.split(at_once), strict=True):
            self._fetch(to, piece)
        return out

    def _fetch(self, to: torch.Tensor, piece: torch.Tensor) -> None:
        self._turn = (self._turn + 1) % _BUFFERS
        fetched = self._fetched[self._turn]
        fetched.synchronize()
        staged = self._buffers[self._turn][: piece.nbytes].view(piece.dtype).view(piece.shape)
        staged.copy_(piece)
        to.copy_(staged, non_blocking=True)
        fetched.record()


@contextmanager
def more_threads(threads: int) -> Iterator[None]:
    """So many of PyTorch's, for copies in host memory, if there are not as many anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, threads))
    try:
        yield
    finally:
        torch.set_num_threads(before)
