"""Host memory that the GPU copies from and to, or that its kernels use."""

from __future__ import annotations

import mmap

import torch

_PINNED: list[mmap.mmap] = []
"""Until the process ends.  CUDA pins whole pages, each once: nothing else may ever lie in them."""


def staging_words(words: int) -> torch.Tensor:
    """int32 [words], zeros: PyTorch's own, in powers of two; no limit of locked memory ends it."""
    return torch.zeros(words, dtype=torch.int32, pin_memory=True)


def pinned_words(words: int) -> torch.Tensor:
    """int32 [words], zeros, on pages of their own, for kernels of the current GPU.

    Of exactly that size.  Raises RuntimeError where the system refuses.
    """
    pages = mmap.mmap(-1, words * 4, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(pages, dtype=torch.int32)
    status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), words * 4, 0))
    if status != 0:
        raise RuntimeError(
            f"{words * 4 / (1 << 30):.2f} GiB of host memory could not be pinned (CUDA error "
            f"{status}): raise the limit of locked memory, or lower --swap-space if that is it"
        )
    _PINNED.append(pages)
    return memory
