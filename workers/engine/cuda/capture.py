"""CUDA graphs of work that has run before, several in one memory pool."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def captured(work: Callable[[], Result], pool: Any) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of `work`, in the current stream, and what it returned: where replays leave it.

    torch.cuda.graph without its waiting and emptied caches, more than a hundred times over.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may use CUDA meanwhile: a communicator's watchdog, say.
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        result = work()
    except BaseException:
        # What went wrong inside is the error to show, not that the capture is broken by it.
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        raise
    graph.capture_end()
    return graph, result


def borrowed(x: torch.Tensor) -> torch.Tensor:
    """The same memory, float32 and contiguous, which this tensor does not keep from its pool.

    Once `x` is gone, the graphs captured next may use it; their pool keeps it mapped.
    """
    if x.dtype is not torch.float32 or not x.is_contiguous():
        raise ValueError(f"only contiguous float32 is borrowed, not {x.dtype} of {x.stride()}")
    return torch.as_tensor(_Memory(x), device=x.device)


class _Memory:
    """A tensor's place, in the form that torch takes from others without a copy."""

    def __init__(self, x: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(x.shape),
            "typestr": "<f4",
            "data": (x.data_ptr(), False),
            "strides": None,
            "version": 2,
        }
