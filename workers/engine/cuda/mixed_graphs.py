"""Graphs of the forward pass of mixed steps: the plan's effect, input, layers, LM head.

Sampling is launched behind them, with the rows that there are: the GPU has the
forward pass to do meanwhile.  They share the decode graphs' memory pool, and the
logits lie in it until the next replay.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch

from .capture import borrowed, captured
from .mixed_sizes import MixedSize


class Forward(Protocol):
    """StepParts.forward_mixed."""

    def __call__(self, size: MixedSize, is_brief: bool = False) -> torch.Tensor: ...


class MixedGraphs:
    """Made before the worker is ready, of sizes in ascending order; see DecodeGraphs."""

    def __init__(self, sizes: Sequence[MixedSize], forward: Forward, pool: Any) -> None:
        """Captures `forward` of each size in the current stream, run once in brief before."""
        self._sizes = sizes
        self._rows = [size.rows for size in sizes]
        self._graphs: dict[MixedSize, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        for size in reversed(sizes):
            forward(size, is_brief=True)
            torch.cuda.synchronize()
            graph, logits = captured(partial(forward, size), pool)
            self._graphs[size] = graph, borrowed(logits)
            del logits

    def padded(self, step: MixedSize) -> MixedSize | None:
        """The captured size for a step of this one; None where it is to be launched."""
        large_enough = self._sizes[bisect_left(self._rows, step.rows) :]
        return next((size for size in large_enough if size.holds(step)), None)

    def forward(self, size: MixedSize) -> torch.Tensor:
        """StepParts.forward_mixed of a captured size; the logits last until the next replay."""
        graph, logits = self._graphs[size]
        graph.replay()
        return logits
