"""The decode step as CUDA graphs: for each of a few batch sizes one graph to the logits,
and one from there to the tokens for each kind of sampling (kinds.py).

A batch runs at the next captured size; the rows that are missing are those of
the dummy slot (slot_tables.py).  All graphs share one memory pool.  That is
sound because the graphs of a size are always replayed one after the other and
nothing in the pool is read later: what lasts from step to step (tables, KV
cache, tokens) lies outside.  Sizes are captured from the largest down, so the
smaller ones fit into the memory that the largest took.

Everything is run once at its size before it is captured, in the same stream:
Triton compiles, cuBLAS makes its workspace and the allocator grows then, not
while a stream is being captured.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .kinds import SamplingKind

Forward = Callable[[int], torch.Tensor]
"""(rows) -> logits of a decode step of that many rows."""

Sample = Callable[[torch.Tensor, int, SamplingKind], None]
"""(logits, rows, kind): samples, and moves the slots on."""


def captured_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, then by 8 to 64, by 16 to 128, by 32 to the most there can be; ascending."""
    steps = (*(1, 2, 4), *range(8, 65, 8), *range(80, 129, 16), *range(160, max_num_seqs, 32))
    return [size for size in steps if size < max_num_seqs] + [max_num_seqs]


class _Graphs(NamedTuple):
    forward: torch.cuda.CUDAGraph
    sample: tuple[torch.cuda.CUDAGraph, ...]
    """By kind."""


class DecodeGraphs:
    """Made before the worker is ready; then forward() and sample() replay."""

    def __init__(self, max_num_seqs: int, forward: Forward, sample: Sample) -> None:
        """Captures every size in the current stream, which must not be the default one."""
        self._sizes = captured_sizes(max_num_seqs)
        self._size_for = [0] * (max_num_seqs + 1)
        for size in reversed(self._sizes):
            self._size_for[: size + 1] = [size] * (size + 1)
        pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, _Graphs] = {}
        collecting = gc.isenabled()
        gc.disable()
        try:
            for size in reversed(self._sizes):
                self._graphs[size] = _capture_size(size, forward, sample, pool)
        finally:
            if collecting:
                gc.enable()

    @property
    def count(self) -> int:
        """Graphs in all."""
        return (1 + len(SamplingKind)) * len(self._graphs)

    def padded(self, rows: int) -> int:
        """The captured size that `rows` decodes run at."""
        return self._size_for[rows]

    def forward(self, size: int) -> None:
        """Gather, layers, LM head at a captured size."""
        self._graphs[size].forward.replay()

    def sample(self, size: int, kind: SamplingKind) -> None:
        """Sampling and slot update, right behind forward() of the same size."""
        self._graphs[size].sample[kind].replay()


def _capture_size(size: int, forward: Forward, sample: Sample, pool: Any) -> _Graphs:
    logits = forward(size)
    for kind in SamplingKind:
        sample(logits, size, kind)
    del logits
    torch.cuda.synchronize()
    forward_graph = torch.cuda.CUDAGraph()
    with _capturing(forward_graph, pool):
        logits = forward(size)
    sample_graphs = tuple(torch.cuda.CUDAGraph() for _ in SamplingKind)
    for kind, graph in zip(SamplingKind, sample_graphs, strict=True):
        with _capturing(graph, pool):
            sample(logits, size, kind)
    # The logits' memory goes back to the pool: the next sizes use it again.
    return _Graphs(forward_graph, sample_graphs)


class _capturing:
    """torch.cuda.graph without its waiting and emptied caches, some eighty times over."""

    def __init__(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        self._graph = graph
        self._pool = pool

    def __enter__(self) -> None:
        # Other threads may use CUDA meanwhile: a communicator's watchdog, say.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # What went wrong inside is the error to show, not that the capture is broken by it.
        with contextlib.suppress(RuntimeError) if kind else contextlib.nullcontext():
            self._graph.capture_end()
