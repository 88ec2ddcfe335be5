"""The plan ring's memory, registered with CUDA: plans are copied to the GPU from where they lie.

Registered, pages stay where they are and the GPU reads them by itself, so a copy
is launched and not waited for.  A frame must not be released before its copy is
done; the engine says how many are not (StepEngine.plans_in_use).
"""

from __future__ import annotations

import contextlib
import logging

import torch


class PlanMemory:
    """Of this process's mapping, for the current GPU, until close()."""

    def __init__(self, words: torch.Tensor) -> None:
        """words: int32, all of the ring."""
        self._words = words
        self._address = words.data_ptr()

    @classmethod
    def register(cls, memory: memoryview, device: torch.device) -> PlanMemory | None:
        """memory: the whole mapping.  None, and a line in the log, where CUDA does not take it."""
        words = torch.frombuffer(memory, dtype=torch.int32)
        status = int(torch.cuda.cudart().cudaHostRegister(words.data_ptr(), words.nbytes, 0))
        if status == 0:
            logging.info("the plan ring's %d bytes are registered with CUDA", words.nbytes)
            return cls(words)
        _forget_error(device)
        logging.warning(
            "the plan ring's %d bytes could not be registered with CUDA (error %d): each plan is "
            "copied to pinned memory first; raise the container's limit of locked memory",
            words.nbytes, status,
        )  # fmt: skip
        return None

    def holds(self, address: int, nbytes: int) -> bool:
        """Whether these bytes are here, to be copied without waiting."""
        return 0 <= address - self._address <= self._words.nbytes - nbytes

    def close(self) -> None:
        """Once nothing is copied from it any more."""
        torch.cuda.cudart().cudaHostUnregister(self._address)


def _forget_error(device: torch.device) -> None:
    """CUDA reports a refused call once more, at the next launch: this one."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)
