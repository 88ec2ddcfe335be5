"""The decode step as CUDA graphs, several for each of a few batch sizes, replayed in this order:

    forward    the plan's effect, input, layers, LM head
    keep       where a row asks for logprobs: what they need of the model's own logits
    edit       where a row asks for it: penalties, biases, bans
    mask       where a row has a grammar: tokens that would leave it
    sample     one for each kind of sampling (kinds.py); the slots move on
    finish     where a row asks for logprobs: those of the sampled tokens

All but the first are a few kernels: graphs of them cost next to nothing to
make, and less than the kernels to launch.

A batch runs at the next captured size; the rows that are missing are those of
the dummy slot (slot_tables.py).  All graphs share one memory pool, those of
mixed steps (mixed_graphs.py) too.  That is sound because the graphs of a step
are always replayed one after the other and nothing in the pool is read later:
what lasts from step to step (tables, KV cache, tokens) lies outside.  Sizes are
captured from the largest down, so the smaller ones fit into the memory that the
largest took.

Everything is run once at its size before it is captured, in the same stream, but of
layers that launch the same one: Triton compiles, cuBLAS makes its workspace and the
allocator grows then, not while a stream is being captured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from .capture import captured
from .kinds import SamplingKind, StepNeeds


class DecodeStep(Protocol):
    """What is captured: the parts of a step of `rows` decodes.  logits: what forward returned.

    is_brief: forward only launches all kinds of kernels that it has.
    """

    def forward(self, rows: int, is_brief: bool = False) -> torch.Tensor: ...

    def keep(self, logits: torch.Tensor, rows: int) -> None: ...

    def edit(self, logits: torch.Tensor, rows: int) -> None: ...

    def mask(self, logits: torch.Tensor, rows: int) -> None: ...

    def sample(self, logits: torch.Tensor, rows: int, kind: SamplingKind) -> None: ...

    def finish(self, rows: int) -> None: ...


def captured_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, then by 8 to 64, by 16 to 128, by 32 to the most there can be; ascending."""
    steps = (*(1, 2, 4), *range(8, 65, 8), *range(80, 129, 16), *range(160, max_num_seqs, 32))
    return [size for size in steps if size < max_num_seqs] + [max_num_seqs]


class _Graphs(NamedTuple):
    """Of one size."""

    forward: torch.cuda.CUDAGraph
    keep: torch.cuda.CUDAGraph
    edit: torch.cuda.CUDAGraph
    mask: torch.cuda.CUDAGraph
    sample: tuple[torch.cuda.CUDAGraph, ...]
    """By kind."""
    finish: torch.cuda.CUDAGraph


class DecodeGraphs:
    """Made before the worker is ready; then forward() and sample() replay."""

    def __init__(self, max_num_seqs: int, step: DecodeStep, pool: Any) -> None:
        """Captures every size in the current stream, which must not be the default one.

        pool: of torch.cuda.graph_pool_handle().
        """
        self._sizes = captured_sizes(max_num_seqs)
        self._size_for = [0] * (max_num_seqs + 1)
        for size in reversed(self._sizes):
            self._size_for[: size + 1] = [size] * (size + 1)
        self._graphs: dict[int, _Graphs] = {}
        for size in reversed(self._sizes):
            self._graphs[size] = _capture_size(size, step, pool)

    @property
    def count(self) -> int:
        """Graphs in all."""
        return (5 + len(SamplingKind)) * len(self._graphs)

    def padded(self, rows: int) -> int:
        """The captured size that `rows` decodes run at."""
        return self._size_for[rows]

    def forward(self, size: int) -> None:
        """Gather, layers, LM head at a captured size."""
        self._graphs[size].forward.replay()

    def sample(self, size: int, needs: StepNeeds) -> None:
        """From the logits to the tokens and the slots' update, behind forward() and any masks."""
        graphs = self._graphs[size]
        if needs.logprobs:
            graphs.keep.replay()
        if needs.edits:
            graphs.edit.replay()
        if needs.masks:
            graphs.mask.replay()
        graphs.sample[needs.kind].replay()
        if needs.logprobs:
            graphs.finish.replay()


def _capture_size(size: int, step: DecodeStep, pool: Any) -> _Graphs:
    logits = step.forward(size, is_brief=True)
    behind: list[Callable[[torch.Tensor], None]] = [
        lambda logits: step.keep(logits, size),
        lambda logits: step.edit(logits, size),
        lambda logits: step.mask(logits, size),
        *(partial(step.sample, rows=size, kind=kind) for kind in SamplingKind),
        lambda logits: step.finish(size),
    ]
    for part in behind:
        part(logits)
    del logits
    torch.cuda.synchronize()
    forward, logits = captured(partial(step.forward, size), pool)
    graphs = [captured(partial(part, logits), pool)[0] for part in behind]
    # The logits' memory goes back to the pool: the next sizes use it again.
    keep, edit, mask, *sample, finish = graphs
    return _Graphs(forward, keep, edit, mask, tuple(sample), finish)
