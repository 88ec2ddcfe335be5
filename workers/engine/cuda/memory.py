"""What the parts of a worker take of its GPU's memory, and an error with the sum when it ends.

Making them is what a worker's start takes its time for, so each is a phase of it, too.

What they leave of the memory that a worker may have is the KV cache's (kv_cache.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

_GIB = 1 << 30


class GpuMemoryError(RuntimeError):
    """The GPU's memory does not hold what the configuration asks for; the text has the sizes."""


class MemoryAccount:
    """Free memory at the start, and what each part has taken since.

    begins: is told of each part that is begun.
    """

    def __init__(self, device: torch.device, begins: Callable[[str], object]) -> None:
        self._device = device
        self._begins = begins
        self._free_at_start, self._total = torch.cuda.mem_get_info(device)
        self._parts: list[tuple[str, int]] = []

    @contextlib.contextmanager
    def taking(self, part: str) -> Iterator[None]:
        """Measures what the block takes.  Raises GpuMemoryError where the memory ends in it."""
        before = self._free()
        self._begins(part)
        try:
            yield
        except RuntimeError as error:
            if not _memory_ended(error):
                raise
            raise GpuMemoryError(
                f"the memory of {torch.cuda.get_device_name(self._device)} ended while making "
                f"room for {part}: {self.describe()}. Lower --gpu-memory-utilization (or "
                "--kv-cache-gib where it is given), --max-num-seqs, --max-num-batched-tokens or "
                "--max-model-len, leave out weights of 12 bits with --e4m7-weights off, or spread "
                "the model over more GPUs with --groups "
                f"({str(error).splitlines()[0]})"
            ) from error
        self._parts.append((part, before - self._free()))

    def describe(self) -> str:
        """One line with all parts, in GiB."""
        parts = [f"{part} {taken / _GIB:.2f}" for part, taken in self._parts]
        return (
            f"of {self._total / _GIB:.2f} GiB, {self._free_at_start / _GIB:.2f} were free at the "
            f"start; {', '.join(parts) or 'nothing was taken'}; {self._free() / _GIB:.2f} are left"
        )

    def left_of(self, utilization: float) -> int:
        """Bytes of such a share of what was free at the start that nothing has taken, or < 0."""
        return int(self._free_at_start * utilization) - (self._free_at_start - self._free())

    def _free(self) -> int:
        """Of the device, memory that PyTorch keeps for later use not included."""
        return torch.cuda.mem_get_info(self._device)[0]


def _memory_ended(error: RuntimeError) -> bool:
    """The allocator has a type of its own for it; the driver, cuBLAS and Triton have words."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "ALLOC_FAILED", "OUT_OF_MEMORY")
    )
